"""TPU chips and slices: published figures, and abstract devices for ahead-of-time compilation without the hardware."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sqa_jax.errors import UserError

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, from Google's documentation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).

    Attributes:
      memory: HBM capacity, bytes.
      flops: peak FLOP/s in bfloat16.
      bandwidth: HBM bandwidth, bytes/s.
      ici: bandwidth of one interconnect (ICI) link in one direction, bytes/s: a chip's published bandwidth divided by
        both directions of its 2 × `dimensions` links.
      dcn: bandwidth of the data center's network between slices, bytes/s for each chip.
      mxus, mxu_width: matrix units (MXUs) of a chip, and the side of one; the clock follows from both and `flops`.
      dimensions: of the torus.
      wraparound: an axis of a multiple of this many chips is a ring (has wraparound links).
      max_axis: most chips along one dimension.
    """

    memory: float
    flops: float
    bandwidth: float
    ici: float
    dcn: float
    mxus: int
    mxu_width: int
    dimensions: int
    wraparound: int
    max_axis: int

    @property
    def clock(self) -> float:
        """Cycles/s at which the MXUs reach the published peak."""
        return self.flops / (2 * self.mxus * self.mxu_width**2)

    @property
    def vmem_bandwidth(self) -> float:
        """Bytes/s between the core and its vector memory (VMEM): about 22 times HBM's (Austin et al. 2025, How to Scale
        Your Model, part 1)."""
        return 22 * self.bandwidth


CHIPS = {
    "v4": Chip(32 * GIB, 275 * TERA, 1228 * GB, 50 * GB, 6.25 * GB, 8, 128, 3, 4, 16),
    "v5e": Chip(16 * GIB, 197 * TERA, 819 * GB, 50 * GB, 3.125 * GB, 4, 128, 2, 16, 16),
    "v5p": Chip(95 * GIB, 459 * TERA, 2765 * GB, 100 * GB, 6.25 * GB, 8, 128, 3, 4, 24),
    "v6e": Chip(32 * GIB, 918 * TERA, 1640 * GB, 100 * GB, 12.5 * GB, 4, 256, 2, 16, 16),
}


def topology(name: str, slices: int = 1) -> tuple[str, list[Any]]:
    """The chip's name and the abstract devices of a topology such as "v5e:4x4", one for each chip.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kind, sizes = (match[1], [int(size) for size in match[2].split("x")]) if match else ("", [])
    chip = CHIPS.get(kind)
    example = {2: "4x4", 3: "2x2x1"}
    if chip is None or len(sizes) != chip.dimensions or not all(_is_axis_size(size, chip) for size in sizes):
        known = ", ".join(f"{name}:{example[listed.dimensions]}" for name, listed in CHIPS.items())
        raise UserError(
            f"--topology {name}: there is no such slice; choose one such as {known}: sizes are 1, 2 or a multiple of 4 "
            "up to 16 (v5p: 24), two for v5e and v6e, three for v4 and v5p"
        )
    if slices < 1:
        raise UserError(f"--slices {slices}: give 1 or more")
    try:
        import libtpu  # noqa: F401  its import sets the compiler's path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu-plan]'") from None
    from jax.experimental import topologies

    # A v4 chip has two TensorCores, which are one device on real slices (megacore).
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    with quiet_compiler():
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        except Exception as error:  # the compiler rejects shapes that do not exist
            raise UserError(f"--topology {name}: {str(error).splitlines()[0][:200]}; choose another size") from None
    return kind, list(devices)


def _is_axis_size(size: int, chip: Chip) -> bool:
    return (size in (1, 2) or size % 4 == 0) and 1 <= size <= chip.max_axis


def use_compiler_only() -> None:
    """Configures JAX, before it is imported, for ahead-of-time compilation on a machine without a TPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # a metadata query of the cloud for the attached TPU
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
        os.environ.setdefault(name, "3")


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Redirects the TPU compiler's output on file descriptor 2 into a temporary file."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def collective_seconds(chip: Chip, devices: Sequence[Any], groups: Int[np.ndarray, "groups n"], sent: float) -> float:
    """Lower bound on the time of a collective in which each device sends `sent` bytes.

    A group uses the torus links of the dimensions that it spans, in both directions; without wraparound links, a
    dimension has only one direction to its far end. However few bytes it sends, each hop takes a microsecond (Austin
    et al. 2025, How to Scale Your Model, part 3). A group that spans several slices is bound by the DCN.

    Args:
      devices: of the mesh, in its order.
      groups: replica groups, as indices into `devices`.
    """
    members = [devices[index] for index in groups[0]]
    if len({getattr(device, "slice_index", None) for device in members}) > 1:
        return sent / chip.dcn
    coords = np.array([device.coords for device in members])
    sizes = np.array([device.coords for device in devices]).max(axis=0) + 1
    spans = coords.max(axis=0) - coords.min(axis=0)
    is_ring = sizes % chip.wraparound == 0
    directions = (1 + is_ring)[spans > 0].sum()
    hops = np.where(is_ring, np.minimum(spans, sizes // 2), spans).sum()
    return max(hops * 1e-6, sent / (chip.ici * directions)) if directions else 0.0
