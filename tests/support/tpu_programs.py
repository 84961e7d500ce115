"""TPU programs for tests of `sqa_jax.plan`: compiled by libtpu with `--reference`, committed HLO text otherwise.

The text is not compared with the committed one, which any change of the model or the compiler alters: every check runs
on whichever of both there is. `--reference --remake` commits it anew.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from sqa_jax.parallel.chips import topology
from sqa_jax.plan.aot import Compilation, OutOfMemory, compile_for_tpu
from tests.support.references import FOLDER, References

# Source lines and serialized kernels, which no check needs.
_UNUSED = re.compile(r", metadata=\{[^}]*\}|(?<=\"body\":\")[^\"]+")


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """A TPU as far as meshes and cost models know one."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def fake_slice(*sizes: int, slices: int = 1) -> list[Any]:
    """Devices of slices of that torus, such as `fake_slice(2, 2)`."""
    x, y, z = (*sizes, 1, 1)[:3]
    chips = math.prod((x, y, z))
    return [
        FakeTpu(number + chips * index, (number % x, number // x % y, number // (x * y)), index)
        for index in range(slices)
        for number in range(chips)
    ]


class TpuPrograms:
    """What the fixture `tpu_programs` gives a test: devices, and programs compiled for them."""

    def __init__(self, reference: References):
        self.live, self.remake = reference.live, reference.remake

    def slice(self, name: str) -> tuple[str, list[Any]]:
        """As `topology`, without libtpu unless live."""
        if self.live:
            return topology(name)
        kind, _, sizes = name.partition(":")
        return kind, fake_slice(*map(int, sizes.split("x")))

    def planning(self, name: str) -> Any:
        """A context in which `sqa_jax.plan` compiles the program NAME."""
        return mock.patch("sqa_jax.plan.measure.compile_for_tpu", functools.partial(self._compile, name))

    def compile(self, name: str, lower: Callable[[], Any], kind: str = "v5e") -> Compilation:
        """The compiled program NAME; `lower` is called if live."""
        compiled = self._compile(name, lower, kind, 0)
        assert isinstance(compiled, Compilation)
        return compiled

    def numbers(self, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Numbers of the compiler, by their names."""
        file = FOLDER / "plan" / f"{name}.npz"
        if not self.live:
            with np.load(file) as saved:
                return {key: float(value) for key, value in saved.items()}
        values = compute()
        if self.remake:
            np.savez_compressed(file, **{key: np.float64(value) for key, value in values.items()})
        return values

    def _compile(self, name: str, lower: Callable[[], Any], kind: str, arguments: int) -> Compilation | OutOfMemory:
        file = FOLDER / "plan" / f"{name}.npz"
        if not self.live:
            return _load(file)
        compiled = compile_for_tpu(lower, kind, arguments)
        if isinstance(compiled, Compilation):
            compiled = Compilation(_UNUSED.sub("", compiled.hlo), compiled.memory)
        if self.remake:
            _save(file, compiled)
        return compiled


def _save(file: Any, compiled: Compilation | OutOfMemory) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(compiled, OutOfMemory):
        np.savez_compressed(file, temporaries=np.float64(compiled.temporaries))
        return
    text = np.frombuffer(compiled.hlo.encode(), np.uint8)
    np.savez_compressed(file, hlo=text, **{f"memory/{key}": np.int64(size) for key, size in compiled.memory.items()})


def _load(file: Any) -> Compilation | OutOfMemory:
    assert file.exists(), f"{file} is missing: run `bash launch/test.sh --reference --remake` and commit it"
    with np.load(file) as saved:
        if "temporaries" in saved:
            return OutOfMemory(float(saved["temporaries"]))
        memory = {key.removeprefix("memory/"): int(saved[key]) for key in saved if key.startswith("memory/")}
        return Compilation(saved["hlo"].tobytes().decode(), memory)
