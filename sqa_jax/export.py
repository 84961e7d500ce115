"""Writes what a run has trained as Hugging Face's libraries read it: the adapter for PEFT, or the merged model.

Reads:  WORKDIR/config.json, the checkpoint that --config.eval.checkpoint names (best, or last), and the student. With
        none and --config given, the bare student, or the adapter of PEFT that --config.adapter.peft names.
Writes: the new directory --out, with a model card, and
        peft  adapter_config.json, adapter_model.safetensors; LoRA beside a prefix or a prompt is a folder each
        hf    config.json, generation_config.json, the tokenizer, and the weights, in several files where over 5 GB
        and of a student that sees a picture of the sample for the card's snippet, and with hf what its processor needs

It is read back and has to give the same logits before it gets its name; what exists is never overwritten.

Examples:
  python -m sqa_jax.export --workdir runs/quickstart --format peft --out exports/quickstart-lora
  python -m sqa_jax.export --workdir runs/quickstart --format hf --dtype bfloat16 --out exports/quickstart
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from sqa_jax.batches.images import ImageBatcher
    from sqa_jax.checkpoints.load import Student


def export(config, workdir: str, kind: str, out: str, dtype: str = "float32") -> None:
    """Exports a run.

    Args:
      kind: peft or hf.
      out: the directory to make.
      dtype: of a merged model's weights, float32 or bfloat16.

    Raises:
      UserError: there is no checkpoint, the adapter cannot be expressed in this format, or `out` exists already.
    """
    from sqa_jax.adapters.peft_read import resolve_peft_adapter
    from sqa_jax.files import atomic_directory
    from sqa_jax.reporting.model_card import EXAMPLE_IMAGE, example, model_card, results_of
    from sqa_jax.runtime import build_runtime
    from sqa_jax.training.restore import check_checkpoint, restore_adapter
    from sqa_jax.training.workdir import check_evaluable, open_workdir

    if not workdir or not out:
        raise UserError("--workdir and --out are needed: the run to export, and the directory to make")
    if kind == "peft" and dtype != "float32":
        raise UserError(f"--dtype {dtype} is for --format hf; adapters are written in float32, as they are trained")
    with atomic_directory(out) as beside:
        root, which = open_workdir(workdir), config.eval.checkpoint
        check_checkpoint(config, root)
        config, given = resolve_peft_adapter(config) if which == "none" else (config, None)
        config = config.copy_and_resolve_references()
        # Wherever and however it was trained: here nothing is rounded but what is written.
        config.student.dtype, config.student.attention = "float32", "auto"
        runtime = build_runtime(config)
        if which != "none":
            check_evaluable(root, config, runtime.student.fingerprint)
        step, tree = restore_adapter(config, root, runtime, given)
        if kind == "peft":
            _write_adapter(config, runtime.student, tree, beside)
        else:
            _write_model(config.adapter, runtime.student, tree, beside, dtype)
        card = model_card(config, runtime.student, tuple(tree), step, kind, out, results_of(root, which, step))
        (beside / "README.md").write_text(card, encoding="utf-8")
        if runtime.student.config.vision is not None:
            if kind == "hf":
                _keep_processor(config, beside)
            (beside / EXAMPLE_IMAGE).write_bytes(example(runtime.student).image.read())
    print(
        f"{out}: {'+'.join(tree) or 'the bare student'}, read back with the same logits; README.md says how to use it"
    )


def _write_adapter(config, student: Student, tree: Any, directory: Path) -> None:
    from sqa_jax.adapters.peft_format import to_peft, write_peft
    from sqa_jax.adapters.peft_read import read_peft

    settings, again = config.adapter, config.adapter.copy_and_resolve_references()
    write_peft(to_peft(settings, tree, student.config, config.student.path, config.student.revision), directory)
    written = read_peft(directory, student.config)
    again.update_from_flattened_dict(written.settings)
    expected = _logits(settings, tree, student)
    _check_equal(_logits(again, written.tree, student), expected)


def _write_model(settings, student: Student, tree: Any, directory: Path, dtype: str) -> None:
    import jax

    from sqa_jax.adapters import merge
    from sqa_jax.checkpoints.load import load_student
    from sqa_jax.checkpoints.weights import write_model
    from sqa_jax.files import write_json
    from sqa_jax.models.t5.config import T5Config

    expected = _logits(settings, tree, student)
    # The merged model takes the base's place in memory.
    merged = jax.jit(lambda tree, base: merge(settings, tree, base, student.config), donate_argnums=1)(
        tree, student.params
    )
    if dtype == "bfloat16":  # of each weight 8 bits are kept, and what is read must be just these
        rounded = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(dtype).astype(a.dtype), tree), donate_argnums=0)
        merged = rounded(merged)
        expected = _logits(settings, {}, dataclasses.replace(student, params=merged))
    write_model(merged, student.config, directory, dtype)
    del merged
    student.tokenizer.save_pretrained(directory)
    generation = {"eos_token_id": list(student.eos_ids), "pad_token_id": student.tokenizer.pad_token_id}
    if isinstance(student.config, T5Config):
        generation["decoder_start_token_id"] = student.config.decoder_start
    write_json(directory / "generation_config.json", generation)
    written = load_student(str(directory))
    _check_equal(_logits(settings, {}, written), expected)


def _keep_processor(config, directory: Path) -> None:
    """Puts the published settings of a student's processor, where it has some, in place of those that we write."""
    import shutil

    from sqa_jax.checkpoints.paths import locate

    if config.student.path.startswith("random:"):
        return
    where = locate(config.student.path, config.student.revision)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if (where / name).exists():
            shutil.copyfile(where / name, directory / name)


def _logits(settings, tree: Any, student: Student) -> np.ndarray:
    """Logits of a few tokens in float32, which stand behind a picture where the student sees."""
    import jax
    import numpy as np

    from sqa_jax import adapters
    from sqa_jax.models.api import extra_model_inputs, module_for
    from sqa_jax.models.soft_tokens import with_soft_tokens
    from sqa_jax.models.t5.config import T5Config

    config, virtual = student.config, adapters.soft_prompt_tokens(settings).count if tree else 0
    words = (7919 * np.arange(1, 17) % config.vocab_size).tolist()
    images = None if config.vision is None else _picture(student)
    tokens = with_soft_tokens([*(images.images.prompt("", student.tokenizer) if images else []), *words], virtual)
    ids, images = np.asarray([tokens], np.int32), None
    if isinstance(config, T5Config):  # the decoder reads the last ones
        ids[:, virtual + 8] = config.decoder_start
    if images is not None:
        ids, images = images.add_images(ids, images.room(images.count(tokens)))
    places = np.arange(len(tokens))[None]

    @jax.jit
    def read(tree, base, ids, images):
        adaptation, weights = (
            adapters.adapter_inputs(settings, tree, config),
            {"params": adapters.model_params(tree, base)},
        )
        module = module_for(config)(config)
        more = extra_model_inputs(module, weights["params"], adaptation, images=images)
        hidden, _ = module.apply(weights, ids, places, np.ones_like(places), adaptation, **more)
        return module.apply(weights, hidden[:, -len(words) :], method="unembed")

    with jax.default_matmul_precision("float32"):
        return np.asarray(read(tree, student.params, ids, images))


def _picture(student: Student) -> ImageBatcher:
    """One picture, of question ""."""
    import numpy as np

    from sqa_jax.batches.images import ImageBatcher
    from sqa_jax.data.images import ImageStore
    from sqa_jax.models.vision.registry import vision_family
    from sqa_jax.reporting.model_card import example

    config = student.config
    pieces, *sizes = vision_family(config.vision).preprocess_image(config.vision, example(student).image.open())
    sizes = np.asarray([[len(pieces), *sizes]])
    return ImageBatcher(ImageStore(config.vision, config.vocab_size, "", pieces, sizes, {"": 0}, {}))


def _check_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Raises `RuntimeError` unless the logits are equal: no user's mistake makes them differ."""
    difference, largest = abs(found - expected).max(), abs(expected).max()
    if not difference <= 1e-4 * largest:
        raise RuntimeError(
            f"what was written gives other logits when it is read: they differ by {difference} of {largest}"
        )


def main() -> None:
    from sqa_jax.training.workdir import run_config

    FLAGS = flags.FLAGS
    export(run_config(FLAGS.workdir), FLAGS.workdir, FLAGS.format, FLAGS.out, FLAGS.dtype)


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    flags.DEFINE_enum("format", "peft", ["peft", "hf"], "The adapter for PEFT, or the merged model for transformers.")
    flags.DEFINE_string("out", "", "The directory to make.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights of a merged model.")
    cli.run(main)
