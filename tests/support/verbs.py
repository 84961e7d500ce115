"""Verbs as the command line starts them, in this process: a start of Python and JAX costs seconds, a call does not."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import warnings
from typing import NamedTuple


class Result(NamedTuple):
    """What a verb left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_verb(verb: str, *arguments: object, package: str = "sqa_jax") -> Result:
    """`python -m PACKAGE.VERB ARGUMENTS`, as far as one process can tell.

    An exception that the verb does not turn into an exit code is raised here. Signals, threads that outlive the verb,
    and what happens when JAX starts need a real process.
    """
    from absl import flags

    known, argv = set(flags.FLAGS), sys.argv
    out, error = io.StringIO(), io.StringIO()
    sys.argv = [verb, *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module may be imported already
            runpy.run_module(f"{package}.{verb}", run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv = argv
        flags.FLAGS.unparse_flags()
        flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
    if code is not None and not isinstance(code, int):
        error.write(f"{code}\n")
    return Result(code if isinstance(code, int) else int(code is not None), out.getvalue(), error.getvalue())
