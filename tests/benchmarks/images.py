"""Benchmarks images: preprocessing to disk against plain PIL, and a training step with and without cached features.

  pieces    images/s and CPU seconds of `load_images`, and of a loop that only decodes and resizes the same files;
            by how much the first takes more memory than the second, at the peak
  step      CPU seconds of a training step of --config, with the vision encoder in each step and with cached features, on
            the same rows: questions with an image, one tile of each if the student allows it

Writes JSON to stdout, and no files.

Examples:
  python -m tests.benchmarks.images --measure pieces --count 2000
  python -m tests.benchmarks.images --measure step --config configs/test.py --config.student.path=random:smolvlm-256m
      --config.student.max_image_tokens=64 --config.adapter.methods="('prompt',)" --config.train.row_length=512
"""

from __future__ import annotations

import functools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from sqa_jax import cli
from sqa_jax.errors import UserError


def peak() -> float:
    """The process' largest memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    """What a function returns, and its wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def pieces(count: int, width: int = 800, height: int = 600) -> dict[str, Any]:
    """Photographs (JPEG) of that size for PaliGemma's tiles of 224 pixels."""
    import numpy as np
    from PIL import Image

    from sqa_jax.data.image import ImageFile
    from sqa_jax.data.images import load_images
    from sqa_jax.data.problem import Problem
    from sqa_jax.models.catalogue import SHAPES

    student, problems = SHAPES["paligemma-3b"], []
    side, rng = student.vision.encoder.image_size, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            file = Path(place) / f"{number}.jpg"
            colours = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8))
            colours.resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
            image = ImageFile(str(file), file.read_bytes)
            problems.append(Problem(str(number), "Which is it?", ("this", "that"), 0, image=image))

        def plain() -> int:
            total = 0
            for problem in problems:
                with Image.open(problem.image.name) as image:
                    total += np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)).size
            return total

        size, loop = timed(plain)
        before = peak()
        made, ours = timed(lambda: load_images(place, student.vision, student.vocab_size, problems))
        assert made.pieces.size == size
    return {
        "pictures": count, "ours": ours, "plain": loop, "pictures_per_second": count / ours["seconds"],
        "cpu_ratio": ours["cpu_seconds"] / loop["cpu_seconds"], "more_memory_mb": peak() - before,
    }  # fmt: skip


def step(config, repeats: int) -> dict[str, Any]:
    """The median of some steps, after one that compiles."""
    import jax
    import numpy as np

    from sqa_jax import adapters
    from sqa_jax.batches.config_data import config_images, encoder_for, load_config_problems, training_problems
    from sqa_jax.batches.images import ImageBatcher
    from sqa_jax.batches.loader import make_loader, pack_sequences
    from sqa_jax.inference.features import cached_features
    from sqa_jax.parallel.mesh import place_rows
    from sqa_jax.prompts.formats import render_target
    from sqa_jax.prompts.recipes import arm_format
    from sqa_jax.runtime import build_runtime
    from sqa_jax.training.optimizer import make_optimizer
    from sqa_jax.training.step import compile_step, init_state, make_step

    mesh, student, decoder = runtime = build_runtime(config)
    if student.config.vision is None:
        raise UserError("config.student.path: a vision-language model is needed, such as random:smolvlm-256m")
    chosen = training_problems(config, load_config_problems(config))
    images = config_images(config, student.config, chosen)
    shown = [problem for problem in chosen if problem.pid in images.image_index]
    recipe, soft_prompt, rows_of = config.recipe, adapters.soft_prompt_tokens(config.adapter), config.train.batch_rows
    fmt = arm_format(recipe)
    gold = [render_target(fmt, p.choices, p.answer, p.lecture, p.solution, recipe.answer) for p in shown]
    encoded = encoder_for(config, student.tokenizer, images).encode(shown, [fmt] * len(shown), gold)
    features, computing = timed(lambda: cached_features(config.data.cache, runtime, images))
    optimizer = make_optimizer(config.optimizer, 100)
    result: dict[str, Any] = {
        "pictures": len(images.sizes),
        "features": int(images.feature_offsets[-1]),
        "computing": computing,
    }
    for name, known in (("tower", None), ("cached", features)):
        rows = pack_sequences(
            [soft_prompt.put(example.tokens, example.image_end) for example in encoded],
            np.array([example.prompt_length + soft_prompt.count for example in encoded]), [problem.pid for problem in shown],
            config.train.row_length, student.tokenizer.pad_token_id, config.seed, student.config.prefix_lm,
            ImageBatcher(images, known),
        )  # fmt: skip
        state = init_state(
            adapters.init_adapter(config.adapter, student.config, student.params, config.seed), optimizer
        )
        shape = jax.eval_shape(lambda state=state: state)
        run = compile_step(make_step(config.adapter, decoder, optimizer, config.seed), shape, student.params, mesh)
        loader, seconds = make_loader(rows, rows_of, 1), []
        for number in range(repeats + 1):
            batch = place_rows(next(loader), mesh, rows_of, leading=1)
            work = functools.partial(run, state, student.params, batch)
            (state, metrics), times = timed(lambda work=work: jax.block_until_ready(work()))
            seconds += [times["cpu_seconds"]] if number else []
        result[name] = {
            "cpu_seconds": seconds, "median": float(np.median(seconds)),
            "questions": len(shown) / rows.rows_of_epoch(0) * rows_of, "loss": float(metrics["loss"]),
        }  # fmt: skip
    result["factor"] = result["tower"]["median"] / result["cached"]["median"]
    return result


def main() -> None:
    values = flags.FLAGS
    result = pieces(values.count) if values.measure == "pieces" else step(values.config, values.repeats)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.define_config("configs/test.py")
    flags.DEFINE_enum("measure", "pieces", ["pieces", "step"], "What to measure.")
    flags.DEFINE_integer("count", 2000, "pieces: number of images.")
    flags.DEFINE_integer("repeats", 3, "step: number of steps, after the first.")
    cli.run(main)
