"""TPU chips and slices: what they have, and devices to compile for without owning one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sqa_jax.errors import UserError

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, from Google's documentation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).

    Attributes:
      memory: of HBM, bytes.
      flops: peak in bfloat16, operations a second.
      bandwidth: of HBM, bytes a second.
      link: of one interconnect (ICI) link in one direction, bytes a second: a chip's published bandwidth over both
        directions of its 2 × `dimensions` links.
      network: of the data center's network between slices, for each chip, bytes a second.
      units, width: matrix units of a chip, and rows of one; from both and `flops` follows the clock.
      dimensions: of the torus.
      ring: chips of one dimension from which on its ends are joined.
      longest: most chips along one dimension.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    units: int
    width: int
    dimensions: int
    ring: int
    longest: int

    @property
    def clock(self) -> float:
        """Cycles a second at which the matrix units reach the published peak."""
        return self.flops / (2 * self.units * self.width**2)

    @property
    def core_bandwidth(self) -> float:
        """Bytes a second between the core and its own memory (VMEM): about 22 times HBM's (Austin et al. 2025, How to
        Scale Your Model, part 1)."""
        return 22 * self.bandwidth


CHIPS = {
    "v4": Chip(32 * GIB, 275 * TERA, 1228 * GB, 50 * GB, 6.25 * GB, 8, 128, 3, 4, 16),
    "v5e": Chip(16 * GIB, 197 * TERA, 819 * GB, 50 * GB, 3.125 * GB, 4, 128, 2, 16, 16),
    "v5p": Chip(95 * GIB, 459 * TERA, 2765 * GB, 100 * GB, 6.25 * GB, 8, 128, 3, 4, 24),
    "v6e": Chip(32 * GIB, 918 * TERA, 1640 * GB, 100 * GB, 12.5 * GB, 4, 256, 2, 16, 16),
}


def topology(name: str, slices: int = 1) -> tuple[str, list[Any]]:
    """The chip's name and the devices of a topology such as "v5e:4x4", each a chip.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    sizes = [int(size) for size in match[2].split("x")] if match else []
    example = {2: "4x4", 3: "2x2x1"}
    if chip is None or len(sizes) != chip.dimensions or not all(_possible(size, chip) for size in sizes):
        known = ", ".join(f"{kind}:{example[known.dimensions]}" for kind, known in CHIPS.items())
        raise UserError(
            f"--topology {name}: there is no such slice; choose one such as {known}: sizes are 1, 2 or a multiple of 4 "
            "up to 16 (v5p: 24), two for v5e and v6e, three for v4 and v5p"
        )
    if slices < 1:
        raise UserError(f"--slices {slices}: give 1 or more")
    try:
        import libtpu  # noqa: F401  says where the compiler is
    except ImportError:
        raise UserError("libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu-plan]'") from None
    from jax.experimental import topologies

    # A v4 chip is two cores, which programs see as one device on real slices.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if match[1] == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    with quiet_compiler():
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        except Exception as error:  # the compiler knows shapes that are not made
            raise UserError(f"--topology {name}: {str(error).splitlines()[0][:200]}; choose another size") from None
    return match[1], list(devices)


def _possible(size: int, chip: Chip) -> bool:
    return (size in (1, 2) or size % 4 == 0) and 1 <= size <= chip.longest


def use_compiler_only() -> None:
    """Tells JAX, before it is imported, that this machine has no TPU and only compiles for one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks the cloud which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
        os.environ.setdefault(name, "3")


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keeps what the TPU's compiler writes to the process' stderr from the user."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def communication_seconds(chip: Chip, devices: Sequence[Any], groups: np.ndarray, sent: float) -> float:
    """Least time of a collective in which each device sends `sent` bytes.

    A group uses the torus' links in the dimensions over which it lies, both ways; a dimension that is no closed ring
    has only one way to its far end. However little it sends, it takes a microsecond for each step on the way (Austin
    et al. 2025, How to Scale Your Model, part 3). A group over several slices is as fast as their network.

    Args:
      devices: of the mesh, in its order.
      groups: [groups, n] places in `devices`.
    """
    members = [devices[place] for place in groups[0]]
    if len({getattr(device, "slice_index", None) for device in members}) > 1:
        return sent / chip.network
    coords = np.array([device.coords for device in members])
    sizes = np.array([device.coords for device in devices]).max(axis=0) + 1
    spans = coords.max(axis=0) - coords.min(axis=0)
    closed = sizes % chip.ring == 0
    ways = (1 + closed)[spans > 0].sum()
    hops = np.where(closed, np.minimum(spans, sizes // 2), spans).sum()
    return max(hops * 1e-6, sent / (chip.link * ways)) if ways else 0.0
