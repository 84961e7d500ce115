"""Writes what a run has trained as Hugging Face's libraries read it: the adapter for PEFT, or the merged model.

Reads:  WORKDIR/config.json, the checkpoint that --config.eval.checkpoint names (best, or last), and the student. With
        none and --config given, the bare student, or the adapter of PEFT that --config.adapter.peft names.
Writes: the new directory --out, with a model card, and
        peft  adapter_config.json, adapter_model.safetensors; LoRA beside a prefix or a prompt is a folder each
        hf    config.json, generation_config.json, the tokenizer, and the weights, in several files where over 5 GB

It is read back and has to give the same logits before it gets its name; what exists is never overwritten.

Examples:
  python -m sqa_jax.export --workdir runs/quickstart --format peft --out exports/quickstart-lora
  python -m sqa_jax.export --workdir runs/quickstart --format hf --dtype bfloat16 --out exports/quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from sqa_jax.students.config import StudentConfig
    from sqa_jax.students.load import Student


def export(config, workdir: str, kind: str, out: str, dtype: str = "float32") -> None:
    """Exports a run.

    Args:
      kind: peft or hf.
      out: the directory to make.
      dtype: of a merged model's weights, float32 or bfloat16.

    Raises:
      UserError: there is no checkpoint, the adapter cannot be expressed in this format, or `out` exists already.
    """
    from sqa_jax.adapters.peft_read import given_adapter
    from sqa_jax.files import atomic_directory
    from sqa_jax.model_card import model_card, results_of
    from sqa_jax.runtime import start
    from sqa_jax.training.restore import check_checkpoint, restore_adapter
    from sqa_jax.training.workdir import check_evaluable, open_workdir

    if not workdir or not out:
        raise UserError("--workdir and --out are needed: the run to export, and the directory to make")
    if kind == "peft" and dtype != "float32":
        raise UserError(f"--dtype {dtype} is for --format hf; adapters are written in float32, as they are trained")
    with atomic_directory(out) as beside:
        root, which = open_workdir(workdir), config.eval.checkpoint
        check_checkpoint(config, root)
        config, given = given_adapter(config) if which == "none" else (config, None)
        config = config.copy_and_resolve_references()
        # Wherever and however it was trained: here nothing is rounded but what is written.
        config.student.dtype, config.student.attention = "float32", "auto"
        runtime = start(config)
        if which != "none":
            check_evaluable(root, config, runtime.student.fingerprint)
        step, tree = restore_adapter(config, root, runtime, given)
        if kind == "peft":
            _write_adapter(config, runtime.student, tree, beside)
        else:
            _write_model(config.adapter, runtime.student, tree, beside, dtype)
        card = model_card(config, runtime.student, tuple(tree), step, kind, out, results_of(root, which, step))
        (beside / "README.md").write_text(card, encoding="utf-8")
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
    expected = _logits(settings, tree, student.params, student.config)
    _check_equal(_logits(again, written.tree, student.params, student.config), expected, 1e-4)


def _write_model(settings, student: Student, tree: Any, directory: Path, dtype: str) -> None:
    import jax

    from sqa_jax.adapters.adapter import merge
    from sqa_jax.files import write_json
    from sqa_jax.students.load import load_student
    from sqa_jax.students.weights import write_model

    expected = _logits(settings, tree, student.params, student.config)
    # The merged model takes the base's place in memory.
    merged = jax.jit(lambda tree, base: merge(settings, tree, base, student.config), donate_argnums=1)(
        tree, student.params
    )
    write_model(merged, student.config, directory, dtype)
    del merged
    student.tokenizer.save_pretrained(directory)
    ends = {"eos_token_id": list(student.eos_ids), "pad_token_id": student.tokenizer.pad_token_id}
    write_json(directory / "generation_config.json", ends)
    written = load_student(str(directory))
    # 8 bits of each weight are kept in bfloat16, and what they lack adds up over the layers.
    tolerance = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    _check_equal(_logits(settings, {}, written.params, written.config), expected, tolerance)


def _logits(settings, tree: Any, base: Any, student: StudentConfig) -> np.ndarray:
    """Logits of a few tokens, in float32."""
    import jax
    import numpy as np

    from sqa_jax.adapters import adapter as adapters
    from sqa_jax.students.modules import module_for
    from sqa_jax.students.t5_config import T5Config

    virtual = adapters.virtual_tokens(settings) if tree else 0
    tokens = 7919 * np.arange(1, virtual + 17)[None] % student.vocab_size
    if isinstance(student, T5Config):  # the decoder reads the last ones
        tokens[:, virtual + 8] = student.decoder_start
    places, ones = np.arange(virtual + 16)[None], np.ones_like(tokens)

    @jax.jit
    def read(tree, base):
        adaptation = adapters.activate(settings, tree, student)
        variables = {"params": adapters.weights(tree, base)}
        return module_for(student)(student).apply(variables, tokens, places, ones, adaptation, method="logits")[0][
            :, virtual:
        ]

    with jax.default_matmul_precision("float32"):
        return np.asarray(read(tree, base))


def _check_equal(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises `RuntimeError` unless the logits are equal: no user's mistake makes them differ."""
    difference, largest = abs(found - expected).max(), abs(expected).max()
    if not difference <= tolerance * largest:
        raise RuntimeError(
            f"what was written gives other logits when it is read: they differ by {difference} of {largest}"
        )


def main() -> None:
    from sqa_jax.evaluate import run_config

    FLAGS = flags.FLAGS
    export(run_config(FLAGS.workdir), FLAGS.workdir, FLAGS.format, FLAGS.out, FLAGS.dtype)


if __name__ == "__main__":
    cli.define_config("configs/quickstart.py")
    flags.DEFINE_enum("format", "peft", ["peft", "hf"], "The adapter for PEFT, or the merged model for transformers.")
    flags.DEFINE_string("out", "", "The directory to make.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights of a merged model.")
    cli.run(main)
