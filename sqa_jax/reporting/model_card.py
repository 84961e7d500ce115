"""The README.md of an exported adapter or model: what it is, what it learned from, how it scored, how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from sqa_jax.batches.config_data import encoder_for
from sqa_jax.checkpoints.load import Student
from sqa_jax.data.problem import Problem
from sqa_jax.data.sources import EMBEDDED, HUB_ID, load_problems
from sqa_jax.files import read_json
from sqa_jax.models.vision.paligemma import SPECIAL_TOKENS
from sqa_jax.models.vision.registry import VisionConfig
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.reporting.format import percent
from sqa_jax.reporting.tables import markdown_table

EXAMPLE_IMAGE = "example.png"  # beside the card of a student that sees: what its snippet shows


def results_of(workdir: Path, which: str, step: int | None) -> dict[str, dict[str, Any]]:
    """The metrics that `sqa_jax.evaluate` left of one checkpoint, {folder: metrics}."""
    files = sorted((workdir / "eval").glob("*/metrics.json"))
    found = {file.parent.name: read_json(file, "an evaluation's metrics") for file in files}
    return {name: one for name, one in found.items() if (one["checkpoint"], one["step"]) == (which, step)}


def model_card(
    config,
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
      out: where the export lies.
      results: of `results_of`.
    """
    path, recipe, embedded = config.student.path, config.recipe, config.data.source in EMBEDDED
    trained = step is not None
    local = path.startswith("random:") or Path(path).expanduser().exists()
    about = ModelCardData(
        base_model=None if local else path,
        library_name="peft" if kind == "peft" else "transformers",
        pipeline_tag=_TASKS[_kind(student)][0],
        tags=["sqa_jax", *methods, *(["science", "multiple-choice", "distillation"] if trained else [])],
        datasets=[HUB_ID] if trained and not embedded else None,
        license=("apache-2.0" if embedded else "cc-by-nc-sa-4.0") if trained else None,
    )
    facts = {
        "Base": f"`{path}`" + (f", revision `{config.student.revision}`" if config.student.revision else ""),
        "Adapted by": _methods(config.adapter, methods, trained),
    }
    terms = f"The terms of the base (`{path}`) hold."
    if trained:
        facts |= {
            "Learned from": f"{_data(config.data)}; arm `{recipe.arm}`, format `{recipe.format}`, answers as `{recipe.answer}`",
            "Checkpoint": f"{config.eval.checkpoint}, of step {step}; seed {config.seed}",
        }
        questions = "which sqa_jax makes itself" if embedded else "ScienceQA's, which are CC BY-NC-SA 4.0"
        terms += f" The licence above is that of the questions, {questions}."
    scores = [
        [name, one["mode"], percent(one["AVG"]), str(one["n"]["AVG"]), str(one["unparsed"])]
        for name, one in results.items()
    ]
    columns = ["evaluation", "by", "accuracy (%)", "questions", "unparsed"]
    parts = [
        f"---\n{about.to_yaml()}\n---",
        f"# {student.name} for science questions",
        f"{'An adapter' if kind == 'peft' else 'A language model'} that answers multiple-choice science questions, made by sqa_jax.",
        "\n".join(f"- **{name}**: {fact}" for name, fact in facts.items()),
        "## Accuracy",
        markdown_table(columns, scores) if scores else "Not evaluated.",
        "## Use",
        *_use(config, student, methods, kind, out),
        "## Licence",
        terms,
    ]
    return "\n\n".join(parts) + "\n"


def _methods(settings, methods: Sequence[str], trained: bool) -> str:
    lora = settings.lora
    layers = (", ".join(lora.targets) or "all linear layers") + (
        ", tower and connector included" if lora.vision_encoder else ""
    )
    words = {
        "lora": f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}{' (rank-stabilised)' if lora.rslora else ''} on {layers}",
        "prefix": f"a prefix of {settings.prefix.length} positions",
        "prompt": f"a prompt of {settings.prompt.length} positions",
        "full": "training all weights",
    }
    begun = f"; {'training began with' if trained else 'it is'} the adapter `{settings.peft}`" if settings.peft else ""
    return (
        "; ".join(words[method] for method in methods) + begun if methods else "nothing: these are the base's weights"
    )


def _data(data) -> str:
    where = {
        **EMBEDDED,
        "dir": f"ScienceQA (`{data.path}`)",
        "hub": f"`{data.path or HUB_ID}`",
    }
    teacher = f", with replies of a teacher ({', '.join(f'`{file}`' for file in data.teacher)})" if data.teacher else ""
    limit = f", {data.train_limit} questions of it" if data.train_limit else ""
    return f"{where[data.source]}, split `{data.train_split}`{limit}{teacher}"


def _use(config, student: Student, methods: Sequence[str], kind: str, out: str) -> list[str]:
    """How it is used."""
    vision, soft = student.config.vision, {"prefix", "prompt"} & set(methods)
    if soft and vision is not None and (vision.uses_mrope or student.config.prefix_lm):
        lost = "positions of pictures in rows and columns" if vision.uses_mrope else "mask that lets a prompt's tokens see each other"  # fmt: skip
        return [
            f"PEFT reads the files, but where it puts a {soft.pop()} in front it leaves out this model's {lost}, and so "
            "answers otherwise than the model was trained; `sqa_jax.evaluate` answers as it was."
        ]
    snippet = f"```python\n{_snippet(config, student, methods, kind, out)}\n```"
    apart = "" if vision is not None else ", each part tokenized by itself"
    return [f"The prompt is as sqa_jax writes it{apart}; another one costs accuracy.", snippet]


# Of each kind of student, its task on the hub, and transformers' class for it.
_TASKS = {
    "decoder": ("text-generation", "AutoModelForCausalLM"),
    "encoder–decoder": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "seeing": ("image-text-to-text", "AutoModelForImageTextToText"),
}


def _kind(student: Student) -> str:
    if student.config.is_encoder_decoder:
        return "encoder–decoder"
    return "decoder" if student.config.vision is None else "seeing"


def example(student: Student) -> Problem:
    """The question of the sample that a card asks; of a student that sees it has a picture."""
    return next(one for one in load_problems("sample").split("test") if student.config.vision is None or one.image)


class _Unseen(NamedTuple):
    """Shows a picture in a prompt as a processor of transformers wants it: not as features, but as what stands for them."""

    vision: VisionConfig

    def prompt(self, pid: str, tokenizer: Any) -> list[int]:
        return tokenizer(self.vision.placeholder, add_special_tokens=False)["input_ids"]


def _snippet(config, student: Student, methods: Sequence[str], kind: str, out: str) -> str:
    """Python that answers a question of the sample."""
    vision, tokenizer, kind_of_student = student.config.vision, student.tokenizer, _kind(student)
    auto, reader = _TASKS[kind_of_student][1], "Tokenizer" if vision is None else "Processor"
    encodes = kind_of_student == "encoder–decoder"
    base, comment = (_written(out), []) if kind == "hf" else _base(config)
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
        steps = [f"model = PeftModel.from_pretrained(model, {_written(folder)})" for folder in folders]
        lines = ["from peft import PeftModel", *lines, *"\nmodel = model.merge_and_unload()\n".join(steps).split("\n")]
        lost = ({"prefix"} if encodes else {"prefix", "prompt"}) & set(methods)
        if lost:
            version = f'# pip install peft "transformers<5.24": under 5.24, generate of peft 0.21 loses a {lost.pop()}'
            lines.insert(0, version)
    ends = f"eos_token_id={list(student.eos_ids)}, pad_token_id={tokenizer.pad_token_id}"
    new = "reply[0]" if encodes else 'reply[0, inputs["input_ids"].shape[1] :]'
    lines += [
        *(_asked_in_parts(config, student) if vision is None else _example_with_image(config, student, out)),
        f"reply = model.generate(**inputs, max_new_tokens={config.eval.max_new_tokens}, do_sample=False, {ends})",
        f"print({reader.lower()}.decode({new}, skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _asked_in_parts(config, student: Student) -> list[str]:
    """Lines that make a question's `inputs`, each part of its prompt tokenized by itself, as training tokenizes it."""
    encoder = encoder_for(config, student.tokenizer)
    before, after = encoder.around
    if student.config.is_encoder_decoder:  # `generate` itself starts the decoder
        after = after.removesuffix(student.tokenizer.decoder_start_token)
    prompt = [before, *(text for _, text in encoder.parts(example(student), arm_format(config.recipe))), after]
    return [
        "prompt = [",
        *(f"    {_written(part)}," for part in prompt if part),
        "]",
        'inputs = tokenizer(prompt, is_split_into_words=True, add_special_tokens=False, return_tensors="pt")',
    ]


def _example_with_image(config, student: Student, out: str) -> list[str]:
    """Lines that make the `inputs` of a question with its picture, by the model's own processor."""
    vision, tokenizer = student.config.vision, student.tokenizer
    encoder = encoder_for(config, tokenizer, _Unseen(vision))
    (encoded,) = encoder.encode([example(student)], [arm_format(config.recipe)])
    prompt = tokenizer.decode(encoded.tokens)
    if not vision.placeholder:  # the processor puts what is around it
        prompt = SPECIAL_TOKENS[0] + prompt.removeprefix(tokenizer.bos_token or "").removesuffix(vision.prompt_end)
    given = f'{"add_special_tokens=False, " * bool(vision.placeholder)}return_tensors="pt"'
    return [
        f"prompt = {_written(prompt)}",
        f"picture = Image.open({_written(f'{out}/{EXAMPLE_IMAGE}')})",
        f"inputs = processor(images=[picture], text=prompt, {given})",
    ]


def _base(config) -> tuple[str, list[str]]:
    """What transformers loads the student from, as arguments, and what has to be done before."""
    path, revision = config.student.path, config.student.revision
    if path.startswith("random:"):
        make = f"--config.student.path={path} --config.seed={config.seed} --config.eval.checkpoint=none --workdir new"
        return '"base"', [f"# python -m sqa_jax.export {make} --format hf --out base"]
    if path.lower().endswith(".gguf"):
        return f"{_written(str(Path(path).parent))}, gguf_file={_written(Path(path).name)}", []
    return _written(path) + (f", revision={_written(revision)}" if revision else ""), []


def _written(text: str) -> str:
    """A Python literal."""
    return json.dumps(text, ensure_ascii=False)
