"""Shared by all verbs: flags, locked configurations, and one line with exit code 2 for a mistake of the user."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from sqa_jax import config_aliases
from sqa_jax.errors import UserError
from sqa_jax.parallel import processes
from sqa_jax.parallel.supervisor import supervise

_defaults: dict[str, str] = {}  # configuration file of a verb that is started without --config


def define_config(default: str) -> None:
    """Defines `--config FILE` (locked; `--config.key=value` overrides) and `--workdir DIR`."""
    from ml_collections import config_flags

    _defaults["config"] = default
    config_flags.DEFINE_config_file("config", None, "Configuration: a Python file with get_config().", lock_config=True)
    flags.DEFINE_string("workdir", "", "Directory of this run's files.")


def define_processes() -> None:
    """Defines the flags of a verb that may run as several processes (see `sqa_jax.parallel.processes`)."""
    group = processes.Group("")
    flags.DEFINE_string(
        "coordinator", "", "Multi-process: HOST:PORT of process 0, or auto on TPU pods and under Slurm."
    )
    flags.DEFINE_integer("processes", group.processes, "Number of processes; with --coordinator HOST:PORT.")
    flags.DEFINE_integer("process", group.process, "Index of this process, from 0; with --coordinator HOST:PORT.")
    flags.DEFINE_integer("start_timeout", group.start_timeout, "Seconds for all processes to connect.")
    flags.DEFINE_integer(
        "heartbeat_timeout", group.heartbeat_timeout, "Seconds without a heartbeat after which a process is lost."
    )


def _start_processes() -> None:
    """Joins the other processes, where the command line names a coordinator."""
    if "coordinator" not in flags.FLAGS:
        return
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in processes.Group._fields}
    group = processes.Group(**values)
    if group.coordinator:
        processes.check(group)
        supervise(group)
        processes.start(group)
    elif group.processes > 1 or group.process > 0:
        raise UserError("--processes and --process need --coordinator: HOST:PORT of process 0")


def given_config(argv: list[str]) -> str | None:
    """The configuration file that a command line names, or None."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg):
            return match[1] if match[1] is not None else following
    return None


def run(main: Callable[[], Any]) -> NoReturn:
    """Parses the command line, calls `main`, and exits: 0, or 2 with one line for a `UserError`.

    `--help` prints the verb's own docstring and its flags.
    """
    doc = sys.modules["__main__"].__doc__ or ""
    if any(arg in ("-h", "-help", "--help") for arg in sys.argv[1:]):
        print(doc.strip() + "\n\nFlags:" + flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        _parse(sys.argv)
        _start_processes()
        main()
    except UserError as error:
        _end(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "jax" not in sys.modules or sys.modules["jax"].process_count() == 1:
            raise
        traceback.print_exc()
        _end(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)
    sys.exit(0)


def _end(message: str, code: int) -> NoReturn:
    """Exits with an error, and ends the other processes of the run."""
    print(f"error: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        processes.fail(message, code)
    sys.exit(code)


def _parse(argv: list[str]) -> None:
    """Parses flags.

    Raises:
      UserError: a flag or a configuration key is unknown (the closest known one is named), a value has the wrong
        type, or the configuration file cannot be loaded.
    """
    if "config" in flags.FLAGS:
        # The flags of overrides are made from sys.argv.
        sys.argv = argv = config_aliases.current_arguments(argv)
        if (file := given_config(argv)) is None:
            file = _defaults["config"]
            argv = [argv[0], f"--config={file}", *argv[1:]]
        known = _keys(_load_config(file))
        for arg in argv[1:]:
            if (match := re.match(r"--?config\.([^=]+)", arg)) and match[1] not in known:
                raise UserError(f"--config.{match[1]}: unknown setting; {_nearest(match[1], known)}")
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"--{error.flagname}: unknown flag; {_nearest(error.flagname, list(flags.FLAGS))}") from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: unexpected argument; every setting is a flag, see --help")


def _load_config(file: str) -> Any:
    """The configuration of a file, without overrides."""
    from sqa_jax.config import check_names

    if not Path(file.partition(":")[0]).is_file():
        raise UserError(f"--config: {file}: not found; name a Python file with get_config(), such as those in configs/")
    try:
        config = flags.FLAGS["config"].parser.parse(file)
    except (AttributeError, KeyError) as error:  # it sets an unknown key
        raise UserError(f"--config: {file}: {_first_sentence(error)}") from None
    except (ImportError, SyntaxError, OSError, ValueError, TypeError) as error:
        raise UserError(f"--config: {file} cannot be loaded ({error})") from None
    check_names(config, f"--config: {file}")
    return config


def _keys(config: Any, prefix: str = "") -> list[str]:
    names = []
    for key in config:
        value = config[key]
        names += _keys(value, f"{prefix}{key}.") if hasattr(value, "to_dict") else [prefix + key]
    return names


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, cutoff=0.0)
    return f"did you mean {close[0]}?" if close else "see --help"


def _first_sentence(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    return " ".join(text.split()).replace("Other fields present", "known")[:400]
