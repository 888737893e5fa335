"""A user's code at work: what it raises is named, and what it changes for the whole process is put back."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cka_probe.errors import CkaProbeError, NetworkError
from cka_probe.runtime.memory import is_out_of_memory
from cka_probe.runtime.randomness import keeping_random_state

_NOT_THE_USER_S = (str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"])
_Mode = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Within the block, what a network raises is a NetworkError whose message begins with ``what``.

    Interrupts, this package's errors and those that say that memory is short stay what they are.
    """
    try:
        yield
    except (KeyboardInterrupt, CkaProbeError):
        raise
    except BaseException as error:  # a user's code may raise anything, SystemExit too
        if is_out_of_memory(error):
            raise
        raise NetworkError(f"{what} {describe_error(error)}") from error


def describe_error(error: BaseException, *, with_place: bool = True) -> str:
    """An error of a user's code in one line, with the place where it was raised."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # the text of a user's error is a user's code too
        lines = []
    # TorchScript puts its own traceback first.
    line = (lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]) if lines else ""
    place = _place(error) if with_place else ""
    return f"{type(error).__name__}{f': {line}' if line else ''}".removesuffix(".") + (f" ({place})." if place else ".")


@contextmanager
def keeping_globals() -> Iterator[None]:
    """Within the block, a user's code may change random states and modes; afterwards they are what they were."""
    with keeping_random_state(), keeping_modes():
        yield


@contextmanager
def keeping_modes() -> Iterator[None]:
    """Within the block, gradient mode, default type, threads and the like may change; afterwards they are as before."""
    before = current_modes()
    try:
        yield
    finally:
        set_modes(before)


def current_modes() -> list[Any]:
    """Gradient mode, default type, threads and the like, as `set_modes` takes them."""
    return [get() for get, _ in _MODES]


def set_modes(values: list[Any]) -> None:
    """Set what `current_modes` gave."""
    for (get, put), value in zip(_MODES, values, strict=True):
        if get() != value:
            put(value)


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # PyTorch 2.6 after set_default_device(None)
        return torch.device("cpu")


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch 2.9 and later: it was set for each backend apart
        return ""


def _set_matmul_precision(precision: str) -> None:
    if precision:
        torch.set_float32_matmul_precision(precision)


def _autocast(device: str) -> _Mode:
    return lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)


_MODES: tuple[_Mode, ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (_matmul_precision, _set_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    _autocast("cpu"),
    _autocast("cuda"),
)
"""What decides the values of every network: how it is read, and how it is set."""


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code in the traceback of an error, if there is one."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and "dist-packages" not in frame.filename
        and Path(frame.filename).is_file()
        and not frame.filename.startswith(_NOT_THE_USER_S)
    ]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
