"""The command line: a frozen dataclass a subcommand holds its options, and one library call does the work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import tyro

from cka_probe.cli.check import Check
from cka_probe.cli.compare import Compare
from cka_probe.cli.distill import Distill, parse_distill
from cka_probe.cli.evaluate import Evaluate
from cka_probe.cli.extract import Extract
from cka_probe.cli.lists import Layers, Measures, Methods
from cka_probe.cli.report import Report, check_folders
from cka_probe.errors import CkaProbeError, OtherProcessError, SpecError
from cka_probe.runtime.interrupts import interruptible, was_interrupted
from cka_probe.runtime.terminal import (
    finish_streams,
    log_to_stderr,
    open_streams,
    print_message,
    print_result,
    quiet_libraries,
    stdout_has_reader,
)

EXIT_MENDABLE, EXIT_INTERRUPTED = 2, 130

_FROM_OUTSIDE = (OSError, MemoryError, RecursionError, UnicodeError, ImportError)
"""What the system or an installation raises, and no bug."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    try:
        with interruptible():
            code = _guarded(arguments)
    finally:
        unprinted = finish_streams()
    if unprinted is not None and code == 0:
        print_message(f"cka-probe: The results could not be printed: {unprinted}.")
        return EXIT_MENDABLE
    return code


def _guarded(arguments: list[str]) -> int:
    """Run a command line; what a user can mend, and what the system refuses, is said in one line."""
    try:
        return _run(arguments)
    except OtherProcessError:
        return EXIT_MENDABLE
    except KeyboardInterrupt as stop:
        print_message(f"cka-probe: {str(stop) or 'interrupted; nothing was written. The same command starts again.'}")
        return EXIT_INTERRUPTED
    except Exception as error:  # what the user cannot mend is raised again
        if was_interrupted():  # a library made an error of its own of it
            print_message("cka-probe: interrupted. Go on with --resume where something was saved, or start again.")
            return EXIT_INTERRUPTED
        if isinstance(error, CkaProbeError):
            print_message(f"cka-probe: {error}")
            return EXIT_MENDABLE
        if isinstance(error, BrokenPipeError) and not stdout_has_reader():
            return 0
        if isinstance(error, _FROM_OUTSIDE):
            print_message(f"cka-probe: {type(error).__name__}: {error}".removesuffix(": "))
            return EXIT_MENDABLE
        if hasattr(error, "add_note"):  # from Python 3.11 on, below the traceback
            error.add_note("This is a bug in cka-probe. Please report it with the command and the lines above.")
        raise


def _run(arguments: list[str]) -> int:
    if "--version" in arguments[:1]:
        return _print_version(arguments[1:])
    check_folders(arguments)
    chosen: Any
    if arguments[:1] == ["distill"]:  # its defaults depend on --recipe and --config
        chosen = parse_distill(arguments[1:])
    else:
        chosen = tyro.extras.subcommand_cli_from_dict(
            {
                "check": Check,
                "compare": Compare,
                "distill": Distill,
                "evaluate": Evaluate,
                "extract": Extract,
                "layers": Layers,
                "measures": Measures,
                "methods": Methods,
                "report": Report,
            },
            prog="cka-probe",
            description="Where two vision networks agree, layer by layer, and distillation that acts on it.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    with quiet_libraries():
        log_to_stderr()
        if not isinstance(chosen, Report):  # which needs neither
            _check_installation()
        return chosen.run(shlex.join(["cka-probe", *arguments])) or 0


def _print_version(others: Sequence[str]) -> int:
    from importlib.metadata import version

    if others:
        raise SpecError(f"--version takes no other arguments, but got {' '.join(others)}.")
    print_result(f"cka-probe {version('cka-probe')}")
    return 0


def _check_installation() -> None:
    """Raise a CkaProbeError where PyTorch or timm cannot be imported, whatever they raise."""
    for name in ("torch", "torchvision", "timm"):
        try:
            import_module(name)
        except Exception as error:  # a broken installation fails in many ways
            if was_interrupted():
                raise
            raise CkaProbeError(
                f"The package {name} cannot be imported: {type(error).__name__}: {error}. Install it again: "
                f"pip install --force-reinstall {name}"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
