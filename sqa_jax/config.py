"""Every setting of the project with its default: what a file in `configs/` starts from."""

from __future__ import annotations

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """The defaults. Files in `configs/` change what they need and return the result."""
    config = ConfigDict()
    config.seed = 0  # of adapter initialisation, data order, dropout and subsets

    config.data = data = ConfigDict()
    data.source = "sample"  # sample: made by the package | dir: ScienceQA's layout | hub: datasets
    data.path = ""  # dir: the directory; hub: a dataset id ("" is derek-thomas/ScienceQA)
    data.splits = "pid_splits.json"  # dir: which file deals the pids to splits
    data.images = "ignore"  # ignore: only whether there is one | check: every image must open
    data.teacher = ()  # files of recorded teacher replies (JSONL), or ("sample",)
    data.train_split = "train"
    data.subjects = ()  # train only on these subjects, such as ("natural science",); () is all
    data.train_limit = 0  # use only so many training questions, drawn with the seed; 0 is all
    data.cache = "datasets"  # where pre-tokenized datasets are kept, one folder a fingerprint

    config.recipe = recipe = ConfigDict()
    recipe.arm = "golden"  # whose supervision; see sqa_jax/data/recipes.py
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

    config.student = student = ConfigDict()
    student.path = ""  # HF directory or hub id, a .gguf file, or "random:<size>" (see students/load.py)
    student.revision = ""  # of a hub id
    student.dtype = "auto"  # computation: float32 | bfloat16 | auto (bfloat16 on TPU and GPU)
    student.remat = "dots"  # none | dots | full: what the backward pass recomputes, see students/decoder.py

    config.adapter = adapter = ConfigDict()
    adapter.methods = ("lora",)  # any of lora, prefix, prompt together; or ("full",)
    adapter.lora = lora = ConfigDict()
    lora.rank = 16
    lora.alpha = 32.0
    lora.dropout = 0.0
    lora.rslora = False  # scale by alpha/sqrt(rank) in place of alpha/rank
    lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapter.prefix = prefix = ConfigDict()
    prefix.length = 16
    prefix.reparametrize = True
    prefix.hidden = 512  # of the reparametrising MLP
    adapter.prompt = prompt = ConfigDict()
    prompt.length = 16
    prompt.init = "vocabulary"  # vocabulary: rows of the embedding table | normal

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3
    optimizer.schedule = "cosine"  # cosine | linear | constant
    optimizer.warmup_ratio = 0.05  # of all steps
    optimizer.final_ratio = 0.1  # learning rate at the end, of the peak
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0  # on matrices only, never on norms and biases
    optimizer.clip_norm = 1.0

    config.train = train = ConfigDict()
    train.epochs = 1.0  # passes over the training questions; a part of a pass is allowed
    train.steps = 0  # overrides epochs where positive
    train.row_length = 1024  # tokens of one packed row
    train.batch_rows = 8  # rows of one micro-batch over all devices
    train.accumulate = 1  # micro-batches of one step
    train.log_every = 1
    train.eval_every = 50  # steps between evaluations on eval.val_split; 0 is only at the end
    train.save_every = 50  # steps between checkpoints (besides the last and the best)
    train.stop_after = 0  # stop cleanly after so many steps of this run (to train in parts); 0 is never

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1: all the devices that are left
    mesh.fsdp = 1
    mesh.tensor = 1

    config.eval = evaluation = ConfigDict()
    evaluation.checkpoint = "best"  # best (lowest validation loss) | last | none: the bare student
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

    config.study = study = ConfigDict()
    study.arms = ("zero_shot", "golden_answer_only", "golden", "teacher_answer", "teacher_and_golden", "teacher_cot", "teacher_lecture", "mistakes", "domain_text")  # fmt: skip
    study.adapters = ("lora",)  # config.adapter.methods of each run, such as "lora", "prefix", "full", "lora+prompt"
    study.students = ()  # paths, as config.student.path; () is that one
    study.seeds = (0,)
    study.equal = "tokens"  # tokens: all arms train as many steps as `reference` | epochs: passes over their examples
    study.reference = "golden"  # the arm that says how long, where arms train equally long
    study.same_questions = True  # arms learn from questions whose replies all arms can use
    study.overrides = ()  # "which key=value", which being an arm, adapter or student: "full optimizer.learning_rate=2e-4"
    study.resample = "questions"  # what intervals resample: questions | questions_and_seeds
    study.explanations = 0  # test questions whose generated explanation is compared with the data's; 0 is none
    study.benchmark = ()  # replies of existing models (JSONL), to be scored beside the students; ("sample",)
    study.device_price = 0.0  # US dollars an hour of the training machine
    return config.lock()
