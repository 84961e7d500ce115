"""Every setting of the project with its default: what a file in `configs/` starts from."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sqa_jax.config_aliases import current_key, current_value, refuse_both


class Section(ConfigDict):
    """A `ConfigDict` in which renamed keys and values work under their old names, see `sqa_jax.config_aliases`.

    Args:
      path: of the section in the configuration, such as "adapter.lora"; "" is the whole.
    """

    def __init__(self, *args: Any, path: str = "", **kwargs: Any):
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_names", {})  # by key, the names under which it was set
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


def check_names(config: ConfigDict, where: str) -> None:
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
    config.seed = 0  # of adapter initialisation, data order, dropout and subsets

    config.data = data = Section(path="data")
    data.source = (
        "sample"  # sample, pictures, pictures-shifted: made by the package | dir: ScienceQA's layout | hub: datasets
    )
    data.path = ""  # dir: the directory; hub: a dataset id ("" is derek-thomas/ScienceQA)
    data.splits = "pid_splits.json"  # dir: which file deals the pids to splits
    data.images = "ignore"  # ignore: opened by those who look | check: every image must open | drop: nobody sees any
    data.teacher = ()  # files of recorded teacher replies (JSONL), or ("sample",)
    data.traces = ()  # conversations with tools to learn from, in place of recipe.arm: python -m sqa_jax.agent --traces
    data.train_split = "train"
    data.subjects = ()  # train only on these subjects, such as ("natural science",); () is all
    data.train_limit = 0  # use only so many training questions, drawn with the seed; 0 is all
    data.cache = "datasets"  # where pre-tokenized datasets are kept, one folder a fingerprint

    config.recipe = recipe = Section(path="recipe")
    recipe.arm = "golden"  # whose supervision; see sqa_jax/prompts/recipes.py
    recipe.format = "QCM-A"  # input parts - target parts, in ScienceQA's notation or QTCHL-… style
    recipe.answer = "letter"  # how an answer is written: letter | text | both
    recipe.caption = True  # image captions are context
    recipe.chat = True  # wrap the prompt in the student's chat template where it has one
    recipe.max_prompt = 384  # tokens of a prompt; where it is longer, the lecture is shortened first, then the hint
    recipe.max_target = 512  # tokens of a target; a longer one is dropped, never shortened
    recipe.samples = 1  # replies of a teacher used for a question, where several were sampled; 0 is all
    recipe.vote = False  # use only replies that agree with the majority of the question's replies
    recipe.teacher_right_only = False  # use only replies with the right answer
    recipe.require = ()  # use only questions with usable replies of these kinds: solution, reasoning

    config.student = student = Section(path="student")
    student.path = ""  # HF directory or hub id, a .gguf file, or "random:<size>" (see students/load.py)
    student.revision = ""  # of a hub id
    student.dtype = "auto"  # computation: float32 | bfloat16 | auto (bfloat16 on TPU and GPU)
    student.attention = "auto"  # auto: one fused kernel where the platform has it | plain | splash (TPU) | cudnn (GPU)
    # of a student that sees: compute what a frozen tower makes of pictures once, and keep it on disk
    student.cache_features = True
    student.max_image_tokens = 0  # of a student that sees: most tokens of a picture; 0 is what it was published with
    student.remat = "dots"  # none | dots | full: what the backward pass recomputes, see students/layers.py

    config.adapter = adapter = Section(path="adapter")
    adapter.methods = ("lora",)  # any of lora, prefix, prompt, visual together; or ("full",)
    # a directory with an adapter of PEFT to begin with, in place of a new one; methods, sizes and scales are then its own
    adapter.peft = ""
    adapter.lora = lora = Section(path="adapter.lora")
    lora.rank = 16
    lora.alpha = 32.0
    lora.dropout = 0.0
    lora.rslora = False  # scale by alpha/sqrt(rank) in place of alpha/rank
    lora.targets = ()  # linear layers by name, such as ("q_proj", "v_proj"), or ("q", "v") of a T5; () is all of them
    lora.vision_encoder = False  # of a student that sees: adapt the layers of tower and connector, too
    adapter.prefix = prefix = Section(path="adapter.prefix")
    prefix.length = 16
    prefix.reparametrize = True
    prefix.hidden = 512  # of the reparametrising MLP
    adapter.prompt = prompt = Section(path="adapter.prompt")
    prompt.length = 16
    prompt.init = "vocabulary"  # vocabulary: rows of the embedding table | mean: their mean | normal | text
    prompt.text = ""  # text: the words to start from, repeated or cut to the length
    prompt.after_image = False  # the prompt stands behind a question's picture, in place of in front of all
    adapter.visual = visual = Section(path="adapter.visual")
    visual.length = 8  # deep prompts in every layer of the tower of a student that sees

    config.optimizer = optimizer = Section(path="optimizer")
    optimizer.learning_rate = 1e-3
    optimizer.schedule = "cosine"  # cosine | linear | constant
    optimizer.warmup_ratio = 0.05  # of all steps
    optimizer.final_ratio = 0.1  # learning rate at the end, of the peak
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0  # on matrices only, never on norms and biases
    optimizer.clip_norm = 1.0

    config.train = train = Section(path="train")
    train.epochs = 1.0  # passes over the training questions; a part of a pass is allowed
    train.steps = 0  # overrides epochs where positive
    train.row_length = 1024  # tokens of one packed row
    train.batch_rows = 8  # rows of one micro-batch over all devices
    train.accumulate = 1  # micro-batches of one step
    train.log_every = 1
    train.eval_every = 50  # steps between evaluations on eval.val_split; 0 is only at the end
    train.save_every = 50  # steps between checkpoints (besides the last and the best)
    train.stop_after = 0  # stop cleanly after so many steps of this run (to train in parts); 0 is never

    config.mesh = mesh = Section(path="mesh")
    mesh.data = -1  # -1: all the devices that are left
    mesh.fsdp = 1
    mesh.tensor = 1

    config.eval = evaluation = Section(path="eval")
    evaluation.checkpoint = (
        "best"  # best (lowest validation loss) | last | none: the bare student, or adapter.peft on it
    )
    evaluation.split = "test"
    evaluation.val_split = "val"  # what the evaluation during training looks at
    evaluation.val_limit = 64
    evaluation.limit = 0  # only so many questions of the split, the first; 0 is all
    # likelihood of the options | reason: generate, then likelihood | generate: parse the text |
    # auto: likelihood where the target begins with the answer, else reason
    evaluation.mode = "auto"
    evaluation.row_length = 1024  # tokens of one row of packed questions (likelihood)
    evaluation.batch_rows = 4
    evaluation.normalize = "none"  # likelihood of an option: none (sum) | length (mean a token)
    evaluation.max_new_tokens = 256  # generate
    evaluation.batch_questions = 16  # generate
    evaluation.temperature = 0.0  # generate; 0 is greedy
    evaluation.folder = ""  # of the predictions, under WORKDIR/eval; "" is the split's name

    config.study = study = Section(path="study")
    study.arms = ("zero_shot", "golden_answer_only", "golden", "teacher_answer", "teacher_and_golden", "teacher_cot", "teacher_lecture", "mistakes", "domain_text")  # fmt: skip
    study.adapters = ("lora",)  # config.adapter.methods of each run, such as "lora", "prefix", "full", "lora+prompt"
    study.students = ()  # paths, as config.student.path; () is that one
    study.seeds = (0,)
    study.equal = "tokens"  # tokens: all arms see as many tokens as `reference` | epochs: passes over their examples
    study.reference = "golden"  # the arm that says how long, where arms train equally long
    study.same_questions = True  # arms learn from questions whose replies all arms can use
    study.overrides = ()  # "which key=value", which being an arm, adapter or student: "full optimizer.learning_rate=2e-4"
    study.resample = "questions"  # what intervals resample: questions | questions_and_seeds
    study.explanations = 0  # explanations of each system that are compared with the data's; 0 is none
    study.benchmark = ()  # replies of existing models (JSONL), to be scored beside the students; ("sample",)
    study.agent = ""  # what python -m sqa_jax.agent left (WORKDIR/<split>), to be a part of the report
    study.device_price = 0.0  # US dollars an hour of the training machine

    config.teach = teach = Section(path="teach")
    teach.client = "gemini"  # gemini (google-generativeai) | genai (google-genai) | openai | student | replay
    teach.model = (
        "gemini-2.5-flash"  # as the service names it; student: path of the weights; replay: "" is the only one
    )
    teach.setting = "QTCH"  # what the prompt shows: QTCH | QTCHL | QTCHLS | QTCHS
    teach.reply = "json"  # json: reasoning, answer, solution | text: thinks step by step, then answers
    teach.image = True  # send the question's image
    teach.caption = False  # show the image's caption, for teachers that see no images
    teach.split = "train"
    teach.limit = 0  # only so many questions of the split, the first; 0 is all
    teach.samples = 1  # replies of each question; more than one needs a temperature
    teach.temperature = 0.0
    teach.max_output_tokens = 4096  # a longer reply is cut off; what a model thinks unseen counts too
    teach.ask_again = ()  # statuses to ask again: any of empty, malformed, unparsed, cut_off, blocked
    teach.ask_at_most = 2  # replies paid for one prompt, however often the command is run with ask_again
    teach.budget = 0.0  # US dollars for all runs in this workdir together; a paid teacher needs it
    teach.prices = (  # (model, US dollars a million input tokens, a million output tokens); (model, 0, 0) is free
        ("gemini-1.5-flash", 0.075, 0.30), ("gemini-1.5-flash-8b", 0.0375, 0.15), ("gemini-1.5-pro", 1.25, 5.00),
        ("gemini-2.0-flash", 0.10, 0.40), ("gemini-2.0-flash-lite", 0.075, 0.30),
        ("gemini-2.5-flash", 0.30, 2.50), ("gemini-2.5-flash-lite", 0.10, 0.40), ("gemini-2.5-pro", 1.25, 10.00),
        ("gpt-4o", 2.50, 10.00), ("gpt-4o-mini", 0.15, 0.60),
        ("gpt-4.1", 2.00, 8.00), ("gpt-4.1-mini", 0.40, 1.60), ("gpt-4.1-nano", 0.10, 0.40),
    )  # fmt: skip
    teach.image_tokens = 3000  # most tokens that the service may charge for one image
    teach.concurrency = 8  # requests under way at once; student: prompts of one call
    teach.requests_per_minute = 0.0  # evenly spaced; 0 is no limit
    teach.retries = 5  # of one question, after an error that may pass
    teach.backoff = 1.0  # seconds before the first retry; doubles, with jitter, and a longer Retry-After wins
    teach.timeout = 120.0  # seconds of one request
    teach.endpoint = ""  # another server that speaks the same protocol, such as http://127.0.0.1:8000/v1 (openai)
    teach.key_env = ""  # which environment variable holds the key; "" is GEMINI_API_KEY or OPENAI_API_KEY
    teach.batch = False  # genai: hand the questions in as batch jobs: cheaper, within a day
    teach.batch_discount = 0.5  # what a batch job costs, as a part of the usual price
    teach.batch_requests = 500  # questions of one batch job, at most
    teach.poll_seconds = 30.0  # between two looks at a batch job
    teach.replay = ()  # replay: files of recorded replies (JSONL), or ("sample",)

    config.agent = agent = Section(path="agent")
    agent.tools = ("describe_image", "retrieve")  # or "module:function", see sqa_jax/agent/tools.py
    agent.retrieval = "oracle"  # oracle: the question's own lecture | bm25: the best match among the training lectures
    # never | always | random | oracle | constrained | free, and only:TOOL; see sqa_jax/agent/policies.py
    agent.policies = ("never", "always", "random", "oracle", "constrained", "free")
    agent.adapter = (
        ""  # workdir of a training whose adapter the student has; "" is the bare student, or adapter.peft on it
    )
    agent.context = 640  # tokens of a conversation; a tool's result that does not fit is shortened
    agent.batch = 32  # conversations under way at one time
    agent.most_calls = 2  # of one conversation
    agent.most_mistakes = 2  # free: unusable texts of one conversation before it has to answer
    agent.max_new_tokens = 48  # free: of one turn
    agent.tool_timeout = 30.0  # seconds that a tool may take
    agent.calibrate = 200  # constrained: training questions that thresholds are chosen by; 0 is a threshold of 0
    agent.evidence = "student"  # what traces call a useful call by: student | records, see sqa_jax/agent/evidence.py
    agent.gain = 0.05  # by how much a call has to raise the right answer's probability (student)
    agent.chip = (
        "v5e",
        0.4,
    )  # the students' price: a chip of config.plan.prices, and the part of its peak that is used

    config.plan = plan = Section(path="plan")
    plan.tokens = 0  # real tokens of an epoch; 0: the dataset's, or about ScienceQA's for a random student
    plan.prices = (  # (chip, US dollars a chip-hour on demand, spot), list prices in the US: check them; 0 is not known
        ("v4", 3.22, 0.0), ("v5e", 1.20, 0.0), ("v5p", 4.20, 0.0), ("v6e", 2.70, 0.0),
    )  # fmt: skip
    return config.lock()
