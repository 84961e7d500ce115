"""Every setting with its default: what a file in `configs/` starts from."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sqa_jax.config_aliases import current_key, current_value, refuse_both


class Section(ConfigDict):
    """A `ConfigDict` in which renamed keys and values work under their old names, see `sqa_jax.config_aliases`.

    Args:
      path: of the section in the configuration, such as "adapter.lora"; "" is the whole.
    """

    _path: str
    _names: dict[str, set[str]]  # by key, the names under which it was set

    def __init__(self, *args: Any, path: str = "", **kwargs: Any):
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_names", {})
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        name, key = key, self._current(key)
        if self.is_locked or name != key:  # not while the defaults are filled in
            self._names.setdefault(key, set()).add(name)
        super().__setitem__(key, current_value(self._full(key), value))

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._current(key))

    def copy_and_resolve_references(self, visit_map: Any = None) -> ConfigDict:
        copy = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copy, "_path", self._path)
        return copy

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else str(key)

    def _current(self, key: str) -> str:
        return current_key(self._full(key)).rpartition(".")[2] if isinstance(key, str) else key


def check_names(config: Any, where: str) -> None:
    """Refuses a configuration file that sets a renamed key under both of its names.

    Raises:
      UserError: it does.
    """
    for section in config.values():
        if isinstance(section, Section):
            for key, names in section._names.items():
                if len(names) > 1:
                    refuse_both(where, *(section._full(name) for name in sorted(names, key=key.__eq__)))
            check_names(section, where)


def default() -> ConfigDict:
    """The defaults. Files in `configs/` change what they need and return the result."""
    config = Section()
    config.seed = 0  # seeds adapter initialization, data order, dropout and subsets

    config.data = data = Section(path="data")
    # sample, image-questions, image-questions-shifted: built in | dir: ScienceQA's layout | hub: a Hugging Face dataset
    data.source = "sample"
    data.path = ""  # dir: the directory; hub: a dataset id ("" is derek-thomas/ScienceQA)
    data.splits = "pid_splits.json"  # dir: the file that assigns the pids to splits
    data.images = "ignore"  # ignore: opened only where needed | check: every image must open | drop: no model gets any
    data.teacher = ()  # files of recorded teacher replies (JSONL), or ("sample",)
    data.traces = ()  # tool-use conversations to train on instead of recipe.arm: python -m sqa_jax.agent --traces
    data.train_split = "train"
    data.subjects = ()  # train only on these subjects, such as ("natural science",); () is all
    data.train_limit = 0  # use only so many training questions, drawn with the seed; 0 is all
    data.cache = "datasets"  # where pre-tokenized datasets are kept, one folder per fingerprint

    config.recipe = recipe = Section(path="recipe")
    recipe.arm = "golden"  # the supervision of the training targets; see sqa_jax/prompts/recipes.py
    recipe.format = "QCM-A"  # input parts - target parts, in ScienceQA's notation or QTCHL-… style
    recipe.answer = "letter"  # form of an answer: letter | text | both
    recipe.caption = True  # include image captions in the prompt
    recipe.chat = True  # wrap the prompt in the student's chat template where it has one
    recipe.max_prompt = 384  # maximum tokens of a prompt; a longer one has its lecture shortened first, then its hint
    recipe.max_target = 512  # maximum tokens of a target; a longer one is dropped, never truncated
    recipe.samples = 1  # teacher replies used per question, where several were sampled; 0 is all
    recipe.vote = False  # use only replies that agree with the majority of the question's replies
    recipe.teacher_right_only = False  # use only replies with the right answer
    recipe.require = ()  # use only questions with usable replies of these kinds: solution, reasoning

    config.student = student = Section(path="student")
    student.path = ""  # HF directory or hub id, a .gguf file, or "random:<size>" (see sqa_jax/models/catalogue.py)
    student.revision = ""  # revision of a hub id
    student.dtype = "auto"  # compute dtype: float32 | bfloat16 | auto (bfloat16 on TPU and GPU)
    student.attention = "auto"  # auto: a fused kernel where the platform has one | plain | splash (TPU) | cudnn (GPU)
    # vision-language models: compute the image features of a frozen vision encoder once, and cache them on disk
    student.cache_features = True
    student.max_image_tokens = 0  # vision-language models: maximum tokens of an image; 0 is the published setting
    student.remat = "dots"  # activation rematerialization: none | dots | full, see sqa_jax/models/layers/linear.py

    config.adapter = adapter = Section(path="adapter")
    adapter.methods = ("lora",)  # any of lora, prefix, prompt, visual together; or ("full",)
    # directory of a PEFT adapter to start from instead of a new one; its methods, sizes and scales replace those below
    adapter.peft = ""
    adapter.lora = lora = Section(path="adapter.lora")
    lora.rank = 16
    lora.alpha = 32.0
    lora.dropout = 0.0
    lora.rslora = False  # rank-stabilized LoRA: scale by alpha/sqrt(rank) instead of alpha/rank
    lora.targets = ()  # adapted linear layers, such as ("q_proj", "v_proj"), or ("q", "v") of a T5; () is all
    lora.vision_encoder = False  # vision-language models: adapt vision encoder and projector, too
    adapter.prefix = prefix = Section(path="adapter.prefix")
    prefix.length = 16  # trained keys and values per layer
    prefix.reparametrize = True  # train an MLP that produces them (Li & Liang 2021)
    prefix.hidden = 512  # hidden size of that MLP
    adapter.prompt = prompt = Section(path="adapter.prompt")
    prompt.length = 16  # soft prompt tokens
    prompt.init = "vocabulary"  # vocabulary: random rows of the embedding table | mean: its mean | normal | text
    prompt.text = ""  # init=text: the text whose embeddings to start from, repeated or cut to the length
    prompt.after_image = False  # insert the soft prompt after the question's image instead of before everything
    adapter.visual = visual = Section(path="adapter.visual")
    visual.length = 8  # deep visual prompt tokens in every layer of the vision encoder

    config.optimizer = optimizer = Section(path="optimizer")
    optimizer.learning_rate = 1e-3  # peak, after warm-up
    optimizer.schedule = "cosine"  # cosine | linear | constant
    optimizer.warmup_ratio = 0.05  # warm-up as a share of all steps
    optimizer.final_ratio = 0.1  # final learning rate as a share of the peak
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0  # decoupled, on matrices only: never on norms and biases
    optimizer.clip_norm = 1.0  # global gradient norm

    config.train = train = Section(path="train")
    train.epochs = 1.0  # passes over the training questions; fractions are allowed
    train.steps = 0  # optimizer steps; overrides epochs if positive
    train.row_length = 1024  # tokens of a packed row
    train.batch_rows = 8  # rows of a micro-batch over all devices
    train.accumulate = 1  # gradient accumulation: micro-batches of a step
    train.log_every = 1  # steps between lines of metrics.jsonl
    train.eval_every = 50  # steps between validations on eval.val_split; 0 is only at the end
    train.save_every = 50  # steps between checkpoints (besides the last and the best)
    train.profile_steps = (
        0  # steps to profile after two warm-up steps, with jax.profiler into WORKDIR/profile; 0 is off
    )
    train.stop_after = 0  # stop cleanly after this many steps of this start (to train in parts); 0 is never

    config.mesh = mesh = Section(path="mesh")
    mesh.data = -1  # data parallelism; -1: all remaining devices
    mesh.fsdp = 1  # fully sharded data parallelism
    mesh.tensor = 1  # tensor parallelism

    config.eval = evaluation = Section(path="eval")
    evaluation.checkpoint = (
        "best"  # best (lowest validation loss) | last | none: the student without an adapter, or with adapter.peft
    )
    evaluation.split = "test"
    evaluation.val_split = "val"  # the split of the validation during training
    evaluation.val_limit = 64  # the first questions of val_split only; 0 is all
    evaluation.limit = 0  # the first questions of the split only; 0 is all
    # likelihood: score the options | reason: generate, then score the options | generate: parse the generated text |
    # auto: likelihood where the target starts with the answer, else reason
    evaluation.mode = "auto"
    evaluation.row_length = 1024  # likelihood: tokens of a row of packed questions
    evaluation.batch_rows = 4  # likelihood: rows of a batch
    evaluation.normalize = "none"  # log-likelihood of an option: none (sum) | length (mean per token)
    evaluation.max_new_tokens = 256  # generate: maximum tokens of an answer
    evaluation.batch_questions = 16  # generate: decode slots, refilled as answers end
    evaluation.temperature = 0.0  # generate: 0 is greedy decoding
    evaluation.folder = ""  # of the predictions, in WORKDIR/eval; "" is the split's name

    config.study = study = Section(path="study")
    study.arms = ("zero_shot", "golden_answer_only", "golden", "teacher_answer", "teacher_and_golden", "teacher_cot", "teacher_lecture", "mistakes", "domain_text")  # fmt: skip
    study.adapters = ("lora",)  # config.adapter.methods of the runs, such as "lora", "prefix", "full", "lora+prompt"
    study.students = ()  # paths, as config.student.path; () is that path alone
    study.seeds = (0,)
    study.equal = "tokens"  # tokens: all arms train on as many tokens as `reference` | epochs: on all their examples
    study.reference = "golden"  # equal=tokens: the arm whose tokens set the length of all
    study.same_questions = True  # train all arms on the questions whose replies every arm can use
    study.overrides = ()  # "which key=value" for an arm, adapter or student: "full optimizer.learning_rate=2e-4"
    study.resample = "questions"  # bootstrap intervals resample: questions | questions_and_seeds
    study.explanations = 0  # explanations of each system to compare with the data's solutions; 0 is none
    study.benchmark = ()  # recorded replies of existing models (JSONL) to score beside the students; or ("sample",)
    study.agent = ""  # results of python -m sqa_jax.agent (WORKDIR/<split>) to include in the report
    study.device_price = 0.0  # US dollars per hour of the training machine

    config.teach = teach = Section(path="teach")
    teach.client = "gemini"  # gemini (google-generativeai) | genai (google-genai) | openai | student | replay
    teach.model = (
        "gemini-2.5-flash"  # the service's name of the model; student: path of the weights; replay: "" is the only one
    )
    teach.setting = "QTCH"  # parts of the prompt: QTCH | QTCHL | QTCHLS | QTCHS
    teach.reply = "json"  # json: reasoning, answer, solution | text: chain of thought, then the answer
    teach.image = True  # send the question's image
    teach.caption = False  # include the image's caption, for text-only teachers
    teach.split = "train"
    teach.limit = 0  # the first questions of the split only; 0 is all
    teach.samples = 1  # replies per question; more than one needs a temperature
    teach.temperature = 0.0
    teach.max_output_tokens = 4096  # a longer reply is cut off; hidden reasoning tokens count too
    teach.ask_again = ()  # reply statuses to request again: any of empty, malformed, unparsed, cut_off, blocked
    teach.ask_at_most = 2  # maximum replies paid per prompt, however often the command runs with ask_again
    teach.budget = 0.0  # US dollars for all runs in this workdir together; required for a paid teacher
    teach.prices = (  # (model, US dollars per million input tokens, per million output tokens); (model, 0, 0) is free
        ("gemini-1.5-flash", 0.075, 0.30), ("gemini-1.5-flash-8b", 0.0375, 0.15), ("gemini-1.5-pro", 1.25, 5.00),
        ("gemini-2.0-flash", 0.10, 0.40), ("gemini-2.0-flash-lite", 0.075, 0.30),
        ("gemini-2.5-flash", 0.30, 2.50), ("gemini-2.5-flash-lite", 0.10, 0.40), ("gemini-2.5-pro", 1.25, 10.00),
        ("gpt-4o", 2.50, 10.00), ("gpt-4o-mini", 0.15, 0.60),
        ("gpt-4.1", 2.00, 8.00), ("gpt-4.1-mini", 0.40, 1.60), ("gpt-4.1-nano", 0.10, 0.40),
    )  # fmt: skip
    teach.image_tokens = 3000  # maximum tokens that the service charges for an image
    teach.concurrency = 8  # concurrent requests; student: prompts of a call
    teach.requests_per_minute = 0.0  # rate limit, evenly spaced; 0 is none
    teach.retries = 5  # per question, after transient errors
    teach.backoff = 1.0  # seconds before the first retry; exponential with jitter, or a longer Retry-After
    teach.timeout = 120.0  # seconds per request
    teach.endpoint = ""  # another server with the same protocol, such as http://127.0.0.1:8000/v1 (openai)
    teach.key_env = ""  # environment variable of the API key; "" is GEMINI_API_KEY or OPENAI_API_KEY
    teach.batch = False  # genai: submit the questions as batch jobs: cheaper, done within a day
    teach.batch_discount = 0.5  # price of a batch job as a share of the usual one
    teach.batch_requests = 500  # maximum questions of a batch job
    teach.poll_seconds = 30.0  # between two polls of a batch job
    teach.replay = ()  # replay: files of recorded replies (JSONL), or ("sample",)

    config.agent = agent = Section(path="agent")
    agent.tools = ("describe_image", "retrieve")  # names, or "module:function", see sqa_jax/agent/tools.py
    agent.retrieval = "oracle"  # oracle: the question's lecture | bm25: the best match among the training lectures
    # never | always | random | oracle | constrained | free, and only:TOOL; see sqa_jax/agent/policies.py
    agent.policies = ("never", "always", "random", "oracle", "constrained", "free")
    agent.adapter = (
        ""  # workdir of the training whose adapter to use; "" is the student without one, or with adapter.peft
    )
    agent.context = 640  # maximum tokens of a conversation; a tool result that does not fit is truncated
    agent.batch = 32  # decode slots: concurrent conversations
    agent.most_calls = 2  # maximum tool calls of a conversation
    agent.most_mistakes = 2  # free: invalid turns of a conversation before it has to answer
    agent.max_new_tokens = 48  # free: maximum tokens of a turn
    agent.tool_timeout = 30.0  # seconds per tool call
    agent.calibrate = 200  # constrained: training questions to calibrate thresholds on; 0 is a threshold of 0
    agent.evidence = (
        "student"  # evidence that a call is useful, for traces: student | records, see sqa_jax/agent/evidence.py
    )
    agent.gain = 0.05  # student: minimum gain of the right answer's probability by a useful call
    agent.chip = (
        "v5e",
        0.4,
    )  # for the price of a student: a chip of config.plan.prices, and its model FLOPs utilization

    config.plan = plan = Section(path="plan")
    plan.tokens = 0  # non-padding tokens of an epoch; 0: the dataset's, or about ScienceQA's for a random student
    plan.prices = (  # (chip, US dollars per chip-hour on demand, spot): US list prices, check them; 0 is unknown
        ("v4", 3.22, 0.0), ("v5e", 1.20, 0.0), ("v5p", 4.20, 0.0), ("v6e", 2.70, 0.0),
    )  # fmt: skip
    return config.lock()
