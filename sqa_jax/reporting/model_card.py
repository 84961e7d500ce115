"""The model card (README.md) of an exported adapter or model: base, training data, accuracy, use and licence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from sqa_jax.batches.config_data import encoder_for
from sqa_jax.checkpoints.load import Student
from sqa_jax.data.problem import ImageFile, Problem
from sqa_jax.data.sources import EMBEDDED, HUB_ID, load_problems
from sqa_jax.files import read_json
from sqa_jax.models.vision.paligemma import SPECIAL_TOKENS, PaliGemmaVision
from sqa_jax.models.vision.registry import VisionConfig
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.reporting.format import percent
from sqa_jax.reporting.tables import markdown_table

EXAMPLE_IMAGE = "example.png"  # beside a vision-language model's card, for its snippet


def results_of(workdir: Path, which: str, step: int | None) -> dict[str, dict[str, Any]]:
    """The metrics that `sqa_jax.evaluate` wrote for one checkpoint, {folder: metrics}."""
    files = sorted((workdir / "eval").glob("*/metrics.json"))
    found = {file.parent.name: read_json(file, "an evaluation's metrics") for file in files}
    return {
        name: metrics for name, metrics in found.items() if (metrics["checkpoint"], metrics["step"]) == (which, step)
    }


def model_card(
    config: Any,
    student: Student,
    methods: Sequence[str],
    step: int | None,
    kind: str,
    out: str,
    results: dict[str, dict[str, Any]],
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
      methods: of the adapter; none is the bare student.
      step: of the run's checkpoint; None where nothing was trained here.
      kind: peft or hf.
      out: the directory of the export.
      results: of `results_of`.
    """
    trained = step is not None
    scores = [
        [name, metrics["mode"], percent(metrics["AVG"]), str(metrics["n"]["AVG"]), str(metrics["unparsed"])]
        for name, metrics in results.items()
    ]
    columns = ["evaluation", "by", "accuracy (%)", "questions", "unparsed"]
    sections = [
        f"---\n{_front_matter(config, student, methods, trained, kind).to_yaml()}\n---",
        f"# {student.name} for science questions",
        f"{'An adapter' if kind == 'peft' else 'A language model'} that answers multiple-choice science questions, made by sqa_jax.",
        "\n".join(f"- **{name}**: {fact}" for name, fact in _facts(config, methods, step).items()),
        "## Accuracy",
        markdown_table(columns, scores) if scores else "Not evaluated.",
        "## Use",
        *_use(config, student, methods, kind, out),
        "## Licence",
        _terms(config, trained),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(config: Any, student: Student, methods: Sequence[str], trained: bool, kind: str) -> ModelCardData:
    path, embedded = config.student.path, config.data.source in EMBEDDED
    local = path.startswith("random:") or Path(path).expanduser().exists()
    return ModelCardData(
        base_model=None if local else path,
        library_name="peft" if kind == "peft" else "transformers",
        pipeline_tag=_TASKS[_model_kind(student)].pipeline,
        tags=["sqa_jax", *methods, *(["science", "multiple-choice", "distillation"] if trained else [])],
        datasets=[HUB_ID] if trained and not embedded else None,
        license=("apache-2.0" if embedded else "cc-by-nc-sa-4.0") if trained else None,
    )


def _facts(config: Any, methods: Sequence[str], step: int | None) -> dict[str, str]:
    student, recipe = config.student, config.recipe
    facts = {
        "Base": f"`{student.path}`" + (f", revision `{student.revision}`" if student.revision else ""),
        "Adapted by": _methods(config.adapter, methods, step is not None),
    }
    if step is not None:
        learned = f"arm `{recipe.arm}`, format `{recipe.format}`, answers as `{recipe.answer}`"
        facts["Learned from"] = f"{_data(config.data)}; {learned}"
        facts["Checkpoint"] = f"{config.eval.checkpoint}, of step {step}; seed {config.seed}"
    return facts


def _terms(config: Any, trained: bool) -> str:
    terms = f"The terms of the base (`{config.student.path}`) hold."
    if not trained:
        return terms
    embedded = config.data.source in EMBEDDED
    questions = "which sqa_jax makes itself" if embedded else "ScienceQA's, which are CC BY-NC-SA 4.0"
    return f"{terms} The licence above is that of the questions, {questions}."


def _methods(settings: Any, methods: Sequence[str], trained: bool) -> str:
    lora = settings.lora
    layers = ", ".join(lora.targets) or "all linear layers"
    if lora.vision_encoder:
        layers += ", vision encoder and connector included"
    texts = {
        "lora": f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{' (rank-stabilised)' if lora.rslora else ''} on {layers}",
        "prefix": f"a prefix of {settings.prefix.length} positions",
        "prompt": f"a prompt of {settings.prompt.length} positions",
        "full": "training all weights",
    }
    if not methods:
        return "nothing: these are the base's weights"
    origin = f"; {'training began with' if trained else 'it is'} the adapter `{settings.peft}`" if settings.peft else ""
    return "; ".join(texts[method] for method in methods) + origin


def _data(data: Any) -> str:
    where = {
        **EMBEDDED,
        "dir": f"ScienceQA (`{data.path}`)",
        "hub": f"`{data.path or HUB_ID}`",
    }
    teacher = f", with replies of a teacher ({', '.join(f'`{file}`' for file in data.teacher)})" if data.teacher else ""
    limit = f", {data.train_limit} questions of it" if data.train_limit else ""
    return f"{where[data.source]}, split `{data.train_split}`{limit}{teacher}"


def _use(config: Any, student: Student, methods: Sequence[str], kind: str, out: str) -> list[str]:
    """The paragraphs on how it is used."""
    vision, soft = student.config.vision, {"prefix", "prompt"} & set(methods)
    if soft and vision is not None and (vision.uses_mrope or student.config.prefix_lm):
        missing = (
            "positions of images in rows and columns"
            if vision.uses_mrope
            else "bidirectional attention within a prompt"
        )
        return [
            f"PEFT reads the files, but where it prepends a {soft.pop()} it leaves out this model's {missing}, and so "
            "answers otherwise than the model was trained; `sqa_jax.evaluate` answers as it was."
        ]
    snippet = f"```python\n{_snippet(config, student, methods, kind, out)}\n```"
    by_part = "" if vision is not None else ", each part tokenized by itself"
    return [f"The prompt is as sqa_jax writes it{by_part}; another one costs accuracy.", snippet]


class _Task(NamedTuple):
    """A kind of model on the hub: its pipeline tag, and transformers' class for it."""

    pipeline: str
    auto_class: str


_TASKS = {
    "decoder": _Task("text-generation", "AutoModelForCausalLM"),
    "encoder–decoder": _Task("text2text-generation", "AutoModelForSeq2SeqLM"),
    "vision-language": _Task("image-text-to-text", "AutoModelForImageTextToText"),
}


def _model_kind(student: Student) -> str:
    if student.config.is_encoder_decoder:
        return "encoder–decoder"
    return "decoder" if student.config.vision is None else "vision-language"


def example(student: Student) -> Problem:
    """The question of the sample in a card's snippet; for a vision-language model it has an image."""
    if student.config.vision is not None:
        return example_with_image()[0]
    return load_problems("sample").split("test")[0]


def example_with_image() -> tuple[Problem, ImageFile]:
    """The first question of the sample that has an image, and the image."""
    problems = load_problems("sample").split("test")
    return next((problem, problem.image) for problem in problems if problem.image is not None)


class _ImagePlaceholder(NamedTuple):
    """Writes an image into a prompt as a processor of transformers expects it: as its placeholder, not as image tokens."""

    vision: VisionConfig

    def prompt_ids(self, pid: str, tokenizer: Any) -> list[int]:
        return tokenizer(self.vision.placeholder, add_special_tokens=False)["input_ids"]


def _snippet(config: Any, student: Student, methods: Sequence[str], kind: str, out: str) -> str:
    """Python that answers a question of the sample."""
    vision, tokenizer, model_kind = student.config.vision, student.tokenizer, _model_kind(student)
    auto, reader = _TASKS[model_kind].auto_class, "Tokenizer" if vision is None else "Processor"
    is_encoder_decoder = model_kind == "encoder–decoder"
    base, comment = (_literal(out), []) if kind == "hf" else _base(config)
    lines = [
        *(["from PIL import Image"] if vision is not None else []),
        f"from transformers import {auto}, Auto{reader}",
        "",
        *comment,
        f"{reader.lower()} = Auto{reader}.from_pretrained({base})",
        f"model = {auto}.from_pretrained({base})",
    ]
    if kind == "peft":
        folders = [out] if len(methods) == 1 else [f"{out}/{method}" for method in methods]
        steps = [f"model = PeftModel.from_pretrained(model, {_literal(folder)})" for folder in folders]
        lines = ["from peft import PeftModel", *lines, *"\nmodel = model.merge_and_unload()\n".join(steps).split("\n")]
        lost = ({"prefix"} if is_encoder_decoder else {"prefix", "prompt"}) & set(methods)
        if lost:
            version = f'# pip install peft "transformers<5.24": under 5.24, generate of peft 0.21 loses a {lost.pop()}'
            lines.insert(0, version)
    ends = f"eos_token_id={list(student.eos_ids)}, pad_token_id={tokenizer.pad_token_id}"
    reply = "reply[0]" if is_encoder_decoder else 'reply[0, inputs["input_ids"].shape[1] :]'
    lines += [
        *(_text_inputs(config, student) if vision is None else _image_inputs(config, student, vision, out)),
        f"reply = model.generate(**inputs, max_new_tokens={config.eval.max_new_tokens}, do_sample=False, {ends})",
        f"print({reader.lower()}.decode({reply}, skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _text_inputs(config: Any, student: Student) -> list[str]:
    """Lines that make a question's `inputs`, each part of its prompt tokenized by itself, as in training."""
    encoder = encoder_for(config, student.tokenizer)
    before, after = encoder.around
    if student.config.is_encoder_decoder:  # `generate` itself starts the decoder
        after = after.removesuffix(student.tokenizer.decoder_start_token)
    prompt = [before, *(text for _, text in encoder.parts(example(student), arm_format(config.recipe))), after]
    return [
        "prompt = [",
        *(f"    {_literal(part)}," for part in prompt if part),
        "]",
        'inputs = tokenizer(prompt, is_split_into_words=True, add_special_tokens=False, return_tensors="pt")',
    ]


def _image_inputs(config: Any, student: Student, vision: VisionConfig, out: str) -> list[str]:
    """Lines that make the `inputs` of a question with its image, by the model's own processor."""
    tokenizer = student.tokenizer
    encoder = encoder_for(config, tokenizer, _ImagePlaceholder(vision))
    (encoded,) = encoder.encode([example(student)], [arm_format(config.recipe)])
    prompt = tokenizer.decode(encoded.tokens)
    if isinstance(vision, PaliGemmaVision):  # its processor adds what is around the prompt
        prompt = SPECIAL_TOKENS[0] + prompt.removeprefix(tokenizer.bos_token or "").removesuffix(vision.prompt_end)
    options = f'{"add_special_tokens=False, " * bool(vision.placeholder)}return_tensors="pt"'
    return [
        f"prompt = {_literal(prompt)}",
        f"image = Image.open({_literal(f'{out}/{EXAMPLE_IMAGE}')})",
        f"inputs = processor(images=[image], text=prompt, {options})",
    ]


def _base(config: Any) -> tuple[str, list[str]]:
    """The arguments with which transformers loads the student, and comment lines on what has to be done before."""
    path, revision = config.student.path, config.student.revision
    if path.startswith("random:"):
        make = f"--config.student.path={path} --config.seed={config.seed} --config.eval.checkpoint=none --workdir new"
        return '"base"', [f"# python -m sqa_jax.export {make} --format hf --out base"]
    if path.lower().endswith(".gguf"):
        return f"{_literal(str(Path(path).parent))}, gguf_file={_literal(Path(path).name)}", []
    return _literal(path) + (f", revision={_literal(revision)}" if revision else ""), []


def _literal(text: str) -> str:
    """A Python literal."""
    return json.dumps(text, ensure_ascii=False)
