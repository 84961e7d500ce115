"""Every shape of the mesh and size of a micro-batch for a slice: what cannot be, what does not fit, what is fastest."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from sqa_jax.errors import UserError
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.parallel.chips import CHIPS
from sqa_jax.parallel.mesh import AXES, make_mesh
from sqa_jax.plan.programs import Data, training_step
from sqa_jax.plan.report import plan

_ROWS = (1, 2, 4, 8, 16, 32)  # of one micro-batch on one chip


def sweep(
    config: Any, student: DecoderConfig, kind: str, devices: list[Any], data: Data, most: int, rows: int = 0
) -> list[dict[str, Any]]:
    """Plans by mesh and micro-batch: those that fit, fastest first, then the others with the reason ("why").

    Compiling takes a minute or two, so only the `most` promising are: candidates that fit by a rough count, in the
    order of their time by operations and by the formula of `sqa_jax.plan.communication`, several meshes and several
    micro-batches of each.

    Args:
      most: programs that are compiled.
      rows: of one optimizer step, kept by accumulating; 0: each micro-batch is a step's, times `config.train.accumulate`.

    Raises:
      UserError: no mesh is possible at all.
    """
    promising, rest = [], []
    for candidate in _candidates(config, len(devices), rows):
        row = {"mesh": {axis: candidate.mesh[axis] for axis in AXES}, "batch": {"rows_per_chip": _rows(candidate)}}
        try:
            step = training_step(candidate, student, make_mesh(candidate.mesh, devices), data)
        except UserError as error:
            rest.append({**row, "fits": False, "why": str(error)})
            continue
        memory, seconds = _rough(candidate, student, kind, step)
        if memory > CHIPS[kind].memory:
            rest.append({**row, "fits": False, "why": f"takes about {memory / 2**30:.0f} GiB of a chip"})
        else:
            promising.append((seconds, candidate, row))
    if not promising and not any("takes about" in row["why"] for row in rest):
        raise UserError(f"no mesh of {len(devices)} chips is possible: {rest[0]['why']}")
    promising = _in_turn(promising)
    count = min(most, len(promising))
    print(f"{len(promising) + len(rest)} candidates; {len(promising)} may fit, compiling {count}", file=sys.stderr)

    done: list[dict[str, Any]] = []
    for _, candidate, row in tqdm(promising[:count], unit="program", dynamic_ncols=True, disable=None):
        too_large = any(
            other["mesh"] == row["mesh"] and not other["fits"] and other["batch"]["rows_per_chip"] < _rows(candidate)
            for other in done
        )
        if too_large:
            done.append({**row, "fits": False, "why": "fewer rows did not fit"})
            continue
        done.append(plan(candidate, student, kind, devices, data))
        if not done[-1]["fits"]:
            done[-1]["why"] = "does not fit"
    rest += [{**row, "fits": None, "why": "less promising, not compiled"} for _, _, row in promising[count:]]
    done.sort(key=lambda row: -row.get("tokens_per_second", 0.0))
    return done + rest


def _in_turn(promising: list[tuple[float, Any, dict]]) -> list[tuple[float, Any, dict]]:
    """The best of the best mesh; then its second, and the best of the second mesh; and so on."""
    promising = sorted(promising, key=lambda entry: entry[0])
    by_mesh: dict[tuple, list] = {}
    for entry in promising:
        by_mesh.setdefault(tuple(entry[2]["mesh"].values()), []).append(entry)
    turns = [(mesh + place, entry) for mesh, own in enumerate(by_mesh.values()) for place, entry in enumerate(own)]
    return [entry for _, entry in sorted(turns, key=lambda turn: turn[0])]


def _candidates(config: Any, chips: int, rows: int) -> Iterator[Any]:
    sizes = [n for n in range(1, chips + 1) if chips % n == 0]
    for fsdp, tensor in itertools.product(sizes, sizes):
        if chips % (fsdp * tensor):
            continue
        data = chips // (fsdp * tensor)
        for count in _ROWS:
            batch = count * data * fsdp
            if rows and rows % batch:
                continue
            one = ConfigDict(config.to_dict())
            one.mesh.data, one.mesh.fsdp, one.mesh.tensor = data, fsdp, tensor
            one.train.batch_rows = batch
            one.train.accumulate = rows // batch if rows else config.train.accumulate
            yield one


def _rows(config: Any) -> int:
    return config.train.batch_rows // (config.mesh.data * config.mesh.fsdp)


def _rough(config: Any, student: DecoderConfig, kind: str, step: Any) -> tuple[float, float]:
    """Bytes of a chip, counting what the backward pass keeps; and seconds a token."""
    chip, chips = CHIPS[kind], config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    outputs = sum(out for _, _, out in student.linear_shapes().values())
    outputs *= 2 if "lora" in config.adapter.methods else 1  # LoRA's are kept beside the base's
    kept = {"full": student.hidden_size, "dots": outputs / config.mesh.tensor}
    places = _rows(config) * config.train.row_length
    activations = 2 * student.num_layers * places * kept.get(config.student.remat, 2 * kept["dots"])
    compute = 2 * step.model_flops / chips / chip.flops  # half of the peak is what to hope for
    seconds = compute + sum(step.expected.values()) / (2 * chip.ici)
    return step.arguments + activations, seconds / step.tokens
