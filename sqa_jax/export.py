"""Exports a run for Hugging Face's libraries: the adapter for PEFT, or the merged model for transformers.

Reads:  WORKDIR/config.json, the checkpoint that --config.eval.checkpoint names (best, or last), and the student. With
        none and --config given, the bare student, or the adapter of PEFT that --config.adapter.peft names.
Writes: the new directory --out, with a model card, and
        peft  adapter_config.json, adapter_model.safetensors; LoRA beside a prefix or a prompt is a folder each
        hf    config.json, generation_config.json, the tokenizer, and the weights, in several files where over 5 GB
        and for a vision-language model an image of the sample for the card's snippet, and with hf its processor's files

The directory is written atomically, after it was read back and gave the same logits; nothing is ever overwritten.

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
    from sqa_jax.models.param_spec import ParamTree
    from sqa_jax.models.vision.registry import VisionConfig

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def export(config: Any, workdir: str, kind: str, out: str, dtype: str = "float32") -> None:
    """Exports a run.

    Args:
      kind: peft or hf.
      out: the directory to make.
      dtype: of a merged model's weights, float32 or bfloat16.

    Raises:
      UserError: there is no checkpoint, the adapter cannot be expressed in this format, or `out` exists already.
    """
    from sqa_jax.evaluation.student import open_student
    from sqa_jax.files import atomic_directory
    from sqa_jax.reporting.model_card import model_card, results_of
    from sqa_jax.training.workdir import open_workdir

    if not workdir or not out:
        raise UserError("--workdir and --out are needed: the run to export, and the directory to make")
    if kind == "peft" and dtype != "float32":
        raise UserError(f"--dtype {dtype} is for --format hf; adapters are written in float32, as they are trained")
    with atomic_directory(out) as directory:
        root, which = open_workdir(workdir), config.eval.checkpoint
        config = config.copy_and_resolve_references()
        # Whatever the run was trained with: nothing is rounded here but what is written.
        config.student.dtype, config.student.attention = "float32", "auto"
        config, runtime, tree, _, step, _ = open_student(config, root)
        if kind == "peft":
            write_adapter(config, runtime.student, tree, directory)
        else:
            write_merged_model(config.adapter, runtime.student, tree, directory, dtype)
        card = model_card(config, runtime.student, tuple(tree), step, kind, out, results_of(root, which, step))
        (directory / "README.md").write_text(card, encoding="utf-8")
        if runtime.student.config.vision is not None:
            _write_image_files(config, runtime.student, kind, directory)
    print(
        f"{out}: {'+'.join(tree) or 'the bare student'}, read back with the same logits; README.md says how to use it"
    )


def write_adapter(config: Any, student: Student, tree: ParamTree, directory: Path) -> None:
    """Writes PEFT's files and checks that they give the same logits when read back."""
    from sqa_jax.adapters.peft_format import to_peft, write_peft
    from sqa_jax.adapters.peft_read import read_peft

    settings, settings_read = config.adapter, config.adapter.copy_and_resolve_references()
    write_peft(to_peft(settings, tree, student.config, config.student.path, config.student.revision), directory)
    written = read_peft(directory, student.config)
    settings_read.update_from_flattened_dict(written.settings)
    expected = _logits(settings, tree, student)
    _check_equal(_logits(settings_read, written.tree, student), expected)


def write_merged_model(settings: Any, student: Student, tree: ParamTree, directory: Path, dtype: str) -> None:
    """Writes base and adapter as one model, and checks that it gives the same logits when read back.

    The student's parameters are donated: the merged model takes their memory.
    """
    import jax

    from sqa_jax import adapters
    from sqa_jax.checkpoints.load import load_student
    from sqa_jax.checkpoints.weights import write_model
    from sqa_jax.files import write_json

    expected = _logits(settings, tree, student)
    merge = jax.jit(lambda tree, base: adapters.merge(settings, tree, base, student.config), donate_argnums=1)
    params = merge(tree, student.params)
    if dtype == "bfloat16":  # of each weight 8 bits are kept, and what is read must be just these
        rounded = jax.jit(lambda tree: jax.tree.map(lambda a: a.astype(dtype).astype(a.dtype), tree), donate_argnums=0)
        params = rounded(params)
        expected = _logits(settings, {}, dataclasses.replace(student, params=params))
    write_model(params, student.config, directory, dtype)
    del params
    student.tokenizer.save_pretrained(directory)
    generation = {"eos_token_id": list(student.eos_ids), "pad_token_id": student.tokenizer.pad_token_id}
    if student.config.is_encoder_decoder:
        generation["decoder_start_token_id"] = student.config.decoder_start
    write_json(directory / "generation_config.json", generation)
    written = load_student(str(directory))
    _check_equal(_logits(settings, {}, written), expected)


def _write_image_files(config: Any, student: Student, kind: str, directory: Path) -> None:
    """The example image of the card; with hf, the published settings of the student's processor in place of ours."""
    import shutil

    from sqa_jax.checkpoints.paths import locate
    from sqa_jax.reporting.model_card import EXAMPLE_IMAGE, example_with_image

    (directory / EXAMPLE_IMAGE).write_bytes(example_with_image()[1].read())
    if kind != "hf" or config.student.path.startswith("random:"):
        return
    where = locate(config.student.path, config.student.revision)
    for name in _PROCESSOR_FILES:
        if (where / name).exists():
            shutil.copyfile(where / name, directory / name)


def _logits(settings: Any, tree: ParamTree, student: Student) -> np.ndarray:
    """Logits of a few tokens in float32, which follow an image where the student is a vision-language model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sqa_jax import adapters
    from sqa_jax.models.api import extra_model_inputs, model_class
    from sqa_jax.models.soft_tokens import with_soft_tokens

    config, count = student.config, adapters.soft_prompt_tokens(settings).count if tree else 0
    text = (7919 * np.arange(1, 17) % config.vocab_size).tolist()
    batcher = None if config.vision is None else _image_batcher(config.vision, config.vocab_size)
    image = [] if batcher is None else batcher.images.prompt_ids("", student.tokenizer)
    row = with_soft_tokens([*image, *text], count)
    tokens, images = np.asarray([row], np.int32), None
    if config.decoder_start is not None:  # the last ones are the decoder's
        tokens[:, count + 8] = config.decoder_start
    if batcher is not None:
        tokens, images = batcher.add_images(tokens, batcher.padded_capacity(batcher.count_features(row)))
    positions = jnp.arange(len(row))[None]
    segments = jnp.ones_like(positions)

    @jax.jit
    def forward(tree: ParamTree, base: ParamTree, tokens: jax.Array, images: Any) -> jax.Array:
        adaptation, params = adapters.adapter_inputs(settings, tree, config), adapters.model_params(tree, base)
        model = model_class(config)(config)
        inputs = extra_model_inputs(model, params, adaptation, images=images)
        hidden, _ = model.apply({"params": params}, tokens, positions, segments, adaptation, **inputs)
        return model.apply({"params": params}, hidden[:, -len(text) :], method="unembed")

    with jax.default_matmul_precision("float32"):
        return np.asarray(forward(tree, student.params, tokens, images))


def _image_batcher(vision: VisionConfig, vocab_size: int) -> ImageBatcher:
    """The image of the card's example, as that of question ""."""
    import numpy as np

    from sqa_jax.batches.images import ImageBatcher
    from sqa_jax.data.images import ImageStore
    from sqa_jax.models.vision.registry import vision_family
    from sqa_jax.reporting.model_card import example_with_image

    pieces, *grid = vision_family(vision).preprocess_image(vision, example_with_image()[1].open())
    sizes = np.asarray([[len(pieces), *grid]])
    return ImageBatcher(ImageStore(vision, vocab_size, "", pieces, sizes, {"": 0}, {}))


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
