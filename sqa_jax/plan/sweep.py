"""A sweep over meshes and micro-batch sizes for a slice: what is impossible, what does not fit, what is fastest."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from sqa_jax.errors import UserError
from sqa_jax.models.student_config import StudentConfig
from sqa_jax.parallel.chips import CHIPS
from sqa_jax.parallel.mesh import AXES, make_mesh
from sqa_jax.plan.epoch_stats import EpochStats
from sqa_jax.plan.programs import TrainingProgram, training_program, with_mesh
from sqa_jax.plan.report import plan_training

_ROWS_PER_CHIP = (1, 2, 4, 8, 16, 32)  # of one micro-batch


class _Candidate(NamedTuple):
    """A configuration of the sweep that may fit.

    Attributes:
      seconds: estimate of a token's time.
      config: with its mesh and micro-batch.
      row: its row of the sweep's result.
    """

    seconds: float
    config: Any
    row: dict[str, Any]


def sweep(
    config: Any,
    student: StudentConfig,
    kind: str,
    devices: list[Any],
    stats: EpochStats,
    max_compiles: int,
    rows: int = 0,
) -> list[dict[str, Any]]:
    """Plans by mesh and micro-batch: those that fit, fastest first, then the others with the reason ("why").

    Compilation takes a minute or two, so only the `max_compiles` most promising candidates are compiled: those that fit
    by a rough estimate, ordered by the time of their FLOPs and of the communication model of
    `sqa_jax.plan.communication`, several meshes and several micro-batches of each.

    Args:
      rows: global batch size of one optimizer step, kept by gradient accumulation; 0: the micro-batch times
        `config.train.accumulate`.

    Raises:
      UserError: no mesh is possible at all.
    """
    promising, rejected = _screen(config, student, kind, devices, stats, rows)
    if not promising and not any("takes about" in row["why"] for row in rejected):
        raise UserError(f"no mesh of {len(devices)} chips is possible: {rejected[0]['why']}")
    promising = _interleave_meshes(promising)
    count = min(max_compiles, len(promising))
    print(f"{len(promising) + len(rejected)} candidates; {len(promising)} may fit, compiling {count}", file=sys.stderr)

    compiled: list[dict[str, Any]] = []
    for _, candidate, row in tqdm(promising[:count], unit="program", dynamic_ncols=True, disable=None):
        smaller_failed = any(
            other["mesh"] == row["mesh"]
            and not other["fits"]
            and other["batch"]["rows_per_chip"] < _rows_per_chip(candidate)
            for other in compiled
        )
        if smaller_failed:
            compiled.append({**row, "fits": False, "why": "fewer rows did not fit"})
            continue
        compiled.append(plan_training(candidate, student, kind, devices, stats))
        if not compiled[-1]["fits"]:
            compiled[-1]["why"] = "does not fit"
    rejected += [{**row, "fits": None, "why": "less promising, not compiled"} for _, _, row in promising[count:]]
    compiled.sort(key=lambda row: -row.get("tokens_per_second", 0.0))
    return compiled + rejected


def _screen(
    config: Any, student: StudentConfig, kind: str, devices: list[Any], stats: EpochStats, rows: int
) -> tuple[list[_Candidate], list[dict[str, Any]]]:
    """Candidates that fit by a rough estimate, and the rows of the others with the reason."""
    promising, rejected = [], []
    for candidate in _candidates(config, len(devices), rows):
        row = {
            "mesh": {axis: candidate.mesh[axis] for axis in AXES},
            "batch": {"rows_per_chip": _rows_per_chip(candidate)},
        }
        try:
            program = training_program(candidate, student, make_mesh(candidate.mesh, devices), stats)
        except UserError as error:
            rejected.append({**row, "fits": False, "why": str(error)})
            continue
        memory, seconds = _rough_estimate(candidate, student, kind, program)
        if memory > CHIPS[kind].memory:
            rejected.append({**row, "fits": False, "why": f"takes about {memory / 2**30:.0f} GiB of a chip"})
        else:
            promising.append(_Candidate(seconds, candidate, row))
    return promising, rejected


def _interleave_meshes(promising: list[_Candidate]) -> list[_Candidate]:
    """The best candidate of the best mesh; then its second, and the best of the second mesh; and so on."""
    by_mesh: dict[tuple, list[_Candidate]] = {}
    for candidate in sorted(promising, key=lambda candidate: candidate.seconds):
        by_mesh.setdefault(tuple(candidate.row["mesh"].values()), []).append(candidate)
    rounds = [
        (mesh_rank + rank, candidate)
        for mesh_rank, of_mesh in enumerate(by_mesh.values())
        for rank, candidate in enumerate(of_mesh)
    ]
    return [candidate for _, candidate in sorted(rounds, key=lambda pair: pair[0])]


def _candidates(config: Any, chips: int, rows: int) -> Iterator[Any]:
    """Configurations with every mesh of the chips and every micro-batch."""
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    for fsdp, tensor in itertools.product(sizes, sizes):
        if chips % (fsdp * tensor):
            continue
        data = chips // (fsdp * tensor)
        for rows_per_chip in _ROWS_PER_CHIP:
            batch = rows_per_chip * data * fsdp
            if rows and rows % batch:
                continue
            candidate = with_mesh(config, data, fsdp, tensor)
            candidate.train.batch_rows = batch
            candidate.train.accumulate = rows // batch if rows else config.train.accumulate
            yield candidate


def _rows_per_chip(config: Any) -> int:
    return config.train.batch_rows // (config.mesh.data * config.mesh.fsdp)


def _rough_estimate(config: Any, student: StudentConfig, kind: str, program: TrainingProgram) -> tuple[float, float]:
    """Bytes on a chip, including the activations kept for the backward pass; and seconds for each token."""
    chip, chips = CHIPS[kind], config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    outputs = sum(out for _, _, out in student.linear_shapes().values())
    outputs *= 2 if "lora" in config.adapter.methods else 1  # LoRA's outputs are kept beside the base's
    kept = {"full": student.hidden_size, "dots": outputs / config.mesh.tensor}
    positions = _rows_per_chip(config) * config.train.row_length
    activations = 2 * student.num_layers * positions * kept.get(config.student.remat, 2 * kept["dots"])
    compute = 2 * program.model_flops / chips / chip.flops  # assumes half of the peak
    seconds = compute + sum(program.expected.values()) / (2 * chip.ici)
    return program.argument_bytes + activations, seconds / program.tokens
