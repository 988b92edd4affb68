"""The command line: vgf-fast demo | generate | train | finetune | evaluate | reproduce | presets | align | info.

Exit codes: 0 done, 1 a mistake, 2 wrong usage, 130 interrupted. Whatever goes wrong is told in one line;
``VGF_FAST_DEBUG=1`` shows its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from vgf_fast.cli.commands import carry_out, train_settings
from vgf_fast.cli.options import Align, Demo, Evaluate, Finetune, Generate, Info, Presets, Reproduce, Train
from vgf_fast.common import interrupts
from vgf_fast.envs.simulators import EvaluationError
from vgf_fast.experiments.run import InterruptedRunError
from vgf_fast.experiments.settings import RunConfig, Sections

# What the library says of its arguments, files and environments; anything else is a bug, here or below.
MISTAKES = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, EvaluationError)


class UsageError(Exception):
    """The arguments are not those of a command."""


def _parse(arguments: list[str]) -> tuple[Any, Sections]:
    """The command, and for training the settings it stands on. Raises ``UsageError``, and ``SystemExit`` for --help."""
    if sum(argument.split("=")[0] == "--set" for argument in arguments) > 1:
        raise ValueError(
            "--set is given twice, of which only the last would count: put all assignments after one --set"
        )
    commands: Any = Demo | Generate | Train | Finetune | Evaluate | Reproduce | Presets | Align | Info
    command = _ask(commands, arguments, prog="vgf-fast", description=__doc__)
    if not isinstance(command, Train):
        return command, {}
    # Once more, with the settings as defaults, so that of the flags only those that were given override them.
    sections = train_settings(command)
    default = Train(command.out, run=RunConfig.from_dict(sections["run"]))
    rest = arguments[arguments.index("train") + 1 :]
    command = _ask(Train, rest, prog="vgf-fast train", default=default)
    return dataclasses.replace(command, run=command.run.checked()), sections


def _ask(kind: Any, arguments: list[str], **options: Any) -> Any:
    """``tyro.cli`` with its complaint as a ``UsageError`` of one line."""
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, config=config, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_line_of(said.getvalue())) from None


def _line_of(box: str) -> str:
    """The complaint in a box of tyro's, the option it takes for meant, and where help is."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    text = " ".join(" ".join(line.strip("│╭╮╰╯|+ ") for line in plain.splitlines()).split())
    parts = [part.strip() for part in re.split("─+|-{4,}", text) if part.strip()]
    meant = re.search(r"Perhaps you meant:? (--[\w-]+)", text)
    # The title, the complaint, perhaps details, and where help is.
    complaint = parts[1] if len(parts) > 1 else text
    program = re.search(r"(vgf-fast[\w -]*?) --help$", parts[-1]) if parts else None
    suggestion = f" (did you mean {meant[1]}?)" if meant else ""
    return f"{complaint.rstrip('.')}{suggestion}; see {program[1] if program else 'vgf-fast'} --help"


def _flattened(arguments: Sequence[str]) -> list[str]:
    """Arguments with tuples as Python writes them, (0, 1), taken apart into the values that a flag takes: 0 1."""
    flat = []
    for argument in arguments:
        match = re.fullmatch(r"(?:(--[\w-]+)=)?[(\[]\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*,?\s*[)\]]", argument)
        flat += [argument] if match is None else [*filter(None, [match[1]]), *re.split(r"\s*,\s*", match[2])]
    return flat


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _flattened(sys.argv[1:] if arguments is None else arguments)
    absent = [name for name in ("tyro", "rich", "yaml") if importlib.util.find_spec(name) is None]
    if absent:
        return _complain(f"the command line needs {' and '.join(absent)}: pip install 'vgf_fast[train]'")
    with interrupts.listening():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        command, sections = _parse(arguments)
        from vgf_fast.cli.console import Console

        carry_out(command, sections, Console())
    except SystemExit as stop:
        return _complain(stop.code) if isinstance(stop.code, str) else int(stop.code or 0)
    except UsageError as error:
        return _complain(str(error), 2)
    except InterruptedRunError as error:
        sys.stderr.write(f"{error}\n")
        return interrupts.INTERRUPTED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return interrupts.INTERRUPTED
    except Exception as error:
        # A library may make of an interrupt that a package is not installed, and the like; it cannot make these.
        if interrupts.requested() and not isinstance(error, (OSError, ArithmeticError)):
            sys.stderr.write("interrupted\n")
            return interrupts.INTERRUPTED
        if os.environ.get("VGF_FAST_DEBUG") == "1":
            raise
        if isinstance(error, MISTAKES):
            return _complain(str(error) or type(error).__name__)
        return _complain(f"{type(error).__name__}: {error} (not foreseen: VGF_FAST_DEBUG=1 shows where)")
    return 0


def _complain(message: str, code: int = 1) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
