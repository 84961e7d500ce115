"""The work of both sides: the same weights, adapter, examples, learning rates, options and prompts.

Writes, into the benchmark's directory: student/ (a Hugging Face directory, float32, that both sides read), adapter/
(PEFT's format), and work.json with token ids and numbers for transformers + PEFT. The examples of a step
are those that this package's loader packs into the step's rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sqa_jax import adapters
from sqa_jax.adapters.peft_format import to_peft, write_peft
from sqa_jax.batches.config_data import encoder_for, load_config_problems
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.batches.loader import pack_dataset, training_steps
from sqa_jax.checkpoints.tokenizer import load_tokenizer
from sqa_jax.checkpoints.weights import save_safetensors
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.files import read_json, write_json
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.parallel.rules import shardings
from sqa_jax.prompts.formats import option_targets
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.runtime import Runtime, build_runtime
from sqa_jax.training.checkpoint import Checkpoints, abstract
from sqa_jax.training.optimizer import make_schedule
from tests.benchmarks.process import WARM, serve


def settings_of(root: Path) -> tuple[Any, dict[str, Any]]:
    """The benchmark's configuration and its other flags."""
    saved = read_json(root / "benchmark.json", "the settings of this benchmark")
    return ConfigDict(saved["config"]), saved


def questions_of(config) -> list[Problem]:
    """The questions to answer."""
    return list(load_config_problems(config).split(config.eval.split)[: config.eval.limit or None])


def adapter_of(config, run: str, runtime: Runtime) -> Any:
    """The initial adapter of both sides, sharded.

    Args:
      run: workdir of a finished training, whose best adapter it is. "" is a random one: small enough that the
        student still generates text, and large enough that a wrong adapter shows in the losses.

    Raises:
      UserError: the run has no such adapter.
    """

    def new(base):
        tree = adapters.init_adapter(config.adapter, runtime.student.config, base, config.seed)
        keys = jax.random.split(jax.random.key(config.seed), len(tree["lora"]))
        for layer, key in zip(tree["lora"].values(), keys, strict=True):
            layer["b"] = 0.01 * jax.random.normal(key, layer["b"].shape)
        return tree

    shape = jax.eval_shape(new, runtime.student.params)
    placed = shardings(shape, runtime.mesh)
    if not run:
        return jax.jit(new, out_shardings=placed)(runtime.student.params)
    found = None
    if (Path(run) / "checkpoints").is_dir():
        checkpoints = Checkpoints(Path(run) / "checkpoints")
        found = checkpoints.restore_adapter("best", abstract(shape, placed))
        checkpoints.close()
    if found is None:
        raise UserError(f"--run: {run}/checkpoints holds no best adapter; name the workdir of a finished training")
    return found[1]


def prepare(root: Path, _: float) -> dict[str, Any]:
    """Writes the work; returns its sizes, for the report."""
    config, flags = settings_of(root)
    runtime = _comparable_runtime(config)
    device = jax.devices()[0]
    student, tokenizer = runtime.student, runtime.student.tokenizer
    ends = student.eos_ids
    if flags["tokenizer"]:
        tokenizer = load_tokenizer(flags["tokenizer"])
        ends = (tokenizer.eos_token_id,)
    save_safetensors(student.params, student.config, root / "student")
    tokenizer.save_pretrained(root / "student")
    write_json(
        root / "student" / "generation_config.json", {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    )
    adapter = to_peft(config.adapter, adapter_of(config, flags["run"], runtime), student.config, "")
    write_peft(adapter, root / "adapter")

    dataset, _ = build_or_reuse(config, tokenizer, load_config_problems(config))
    rows = pack_dataset(dataset, config, tokenizer.pad_token_id)
    per_step = config.train.batch_rows * config.train.accumulate
    steps = training_steps(config, rows)
    if steps <= WARM:
        raise UserError(f"config.train.steps is {steps}; measure more than the {WARM} warm-up steps")

    def examples(step: int) -> list[dict[str, Any]]:
        members = [k for row in range(per_step) for k in rows.members(step * per_step + row)]
        return [{"tokens": rows.tokens[k].tolist(), "prompt_length": int(rows.prompt_lengths[k])} for k in members]

    questions, fmt, encoder = questions_of(config), arm_format(config.recipe), encoder_for(config, tokenizer)
    prompts = [example.tokens for example in encoder.encode(questions, [fmt] * len(questions))]
    options = [encoder.plain(option_targets(question, "", config.recipe.answer)) for question in questions]
    schedule = make_schedule(config.optimizer, steps)
    work = {
        "device": {"cpu": "cpu", "gpu": "cuda"}[device.platform],
        "dtype": runtime.decoder.dtype.name,
        "batches": [examples(step) for step in range(steps)],
        "rates": [float(schedule(step)) for step in range(steps)],
        "optimizer": config.optimizer.to_dict(),
        "prompts": prompts,
        "options": options,
        "ends": list(ends),
        "max_new_tokens": config.eval.max_new_tokens,
        "batch_questions": config.eval.batch_questions,
        "batch_options": flags["batch_options"],
        "products": _products(student.config, config.train.batch_rows, *rows.limits[:2]),
    }
    write_json(root / "work.json", work)
    sizes = {
        "accelerator": device.device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(student.params)),
        "real_tokens_in_rows": rows.packing_efficiency(),
    }
    return sizes | _sizes(work)


def _comparable_runtime(config) -> Runtime:
    """The runtime of a configuration that transformers + PEFT can run, too.

    Raises:
      UserError: they cannot.
    """
    if tuple(config.adapter.methods) != ("lora",):
        raise UserError(f"config.adapter.methods is {tuple(config.adapter.methods)}; both sides are compared with lora")
    runtime = build_runtime(config)
    device = jax.devices()[0]
    if device.platform not in ("cpu", "gpu") or (device.platform == "gpu" and runtime.mesh.size > 1):
        raise UserError(
            f"{runtime.mesh.size} {device.platform} devices; transformers + PEFT are compared on a CPU or on one GPU: "
            "set JAX_PLATFORMS=cpu or CUDA_VISIBLE_DEVICES=0"
        )
    return runtime


def _sizes(work: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the work, on average."""
    batches, prompts = work["batches"], work["prompts"]
    return {
        "dtype": work["dtype"],
        "steps": len(batches),
        "examples_per_step": float(np.mean([len(batch) for batch in batches])),
        "tokens_per_example": float(np.mean([len(example["tokens"]) for batch in batches for example in batch])),
        "questions": len(prompts),
        "options_per_question": float(np.mean([len(of_question) for of_question in work["options"]])),
        "tokens_per_prompt": float(np.mean([len(prompt) for prompt in prompts])),
    }


def _products(student: DecoderConfig, batch_rows: int, tokens: int, targets: int) -> list[list[int]]:
    """Matrix products with weights in a micro-batch's forward pass: [times, N, in, out] of each shape."""
    linear = [[student.num_layers, batch_rows * tokens, *shape] for _, *shape in student.linear_shapes().values()]
    return [*linear, [1, batch_rows * targets, student.hidden_size, student.vocab_size]]


if __name__ == "__main__":
    serve({"prepare": prepare})
