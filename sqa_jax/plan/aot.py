"""Ahead-of-time compilation for TPUs: the compiled HLO text and memory analysis of a lowered program."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sqa_jax.errors import UserError
from sqa_jax.parallel.chips import CHIPS, GIB, quiet_compiler

# The compiler's out-of-memory messages: bytes of temporaries, or of everything together.
_TEMPORARIES, _TOTAL = r"temporaries \(([\d.]+)G\)", r"[Uu]sed ([\d.]+)G of"


class Compilation(NamedTuple):
    """A compiled program.

    Attributes:
      hlo: text of the optimized module.
      memory: bytes on one chip: arguments, outputs, donated, temporaries, code, and peak.
    """

    hlo: str
    memory: dict[str, int]


class OutOfMemory(NamedTuple):
    """A program that does not fit.

    Attributes:
      temporaries: bytes that it needs besides its arguments, None if the compiler did not say.
    """

    temporaries: float | None


def compile_for_tpu(lower: Callable[[], jax.stages.Lowered], kind: str, arguments: int) -> Compilation | OutOfMemory:
    """Lowers and compiles a program.

    Args:
      lower: traces the program.
      kind: a key of `CHIPS`.
      arguments: bytes of parameters, state and batch on one chip.

    Raises:
      UserError: the compiler cannot print the compiled program, so that it cannot be analysed.
    """
    lowered = lower()
    try:
        with quiet_compiler(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # programs for detached devices are not in JAX's compilation cache
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if match := re.search(_TEMPORARIES, str(error)):
            return OutOfMemory(float(match[1]) * GIB)
        if match := re.search(_TOTAL, str(error)):
            return OutOfMemory(float(match[1]) * GIB - arguments)
        return OutOfMemory(None)
    sizes: Any = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    memory["peak"] = sum(memory.values()) - 2 * memory["donated"]
    return Compilation(_hlo_text(compiled, kind, memory["peak"]), memory)


def _hlo_text(compiled: jax.stages.Compiled, kind: str, peak: int) -> str:
    try:
        text = compiled.as_text()
        assert text is not None
        return text
    except jax.errors.JaxRuntimeError as error:  # libtpu of 2026, if a v5p's sparse cores take part
        raise UserError(
            f"the program fits ({peak / GIB:.1f} of {CHIPS[kind].memory / GIB:.0f} GiB), but the TPU's compiler cannot print it, "
            f"so its time is unknown ({str(error).splitlines()[0][:120]}); plan with other rows a chip, or for another --topology"
        ) from None
