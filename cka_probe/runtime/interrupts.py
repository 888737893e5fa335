"""Ctrl-C, and the signals by which schedulers and terminals end a job. Importing this loads nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_OF_CHILDREN = [signal.SIGCHLD] if hasattr(signal, "SIGCHLD") else []
_INTERRUPTED = threading.Event()
_PATIENCE_S = 10.0

_open_blocks = 0  # of `interruptible`


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, as a class of its own: see `interruptible`."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, SIGINT (Ctrl-C), SIGTERM and SIGHUP raise `Interrupt`; a SIGHUP that was ignored stays so.

    After a plain KeyboardInterrupt that passed through `exec` of a string, as dataclasses do while packages are
    imported, CPython kills its process at the end by SIGINT, even where the interrupt was caught. And one that falls
    into a callback of the interpreter's own is printed and lost: here it is not printed, and `raise_if_interrupted`
    takes it at the next batch. Further signals are ignored for a while, so that what the first one started, saving and
    saying how to go on, comes to its end.

    Worker processes ignore Ctrl-C, which a terminal sends to them too: their parent ends them.
    """
    global _open_blocks
    last = 0.0

    def interrupt(*_: object) -> None:
        nonlocal last
        if _INTERRUPTED.is_set() and time.monotonic() - last < _PATIENCE_S:
            return
        last = time.monotonic()
        _INTERRUPTED.set()
        for number in _OF_CHILDREN:  # PyTorch's handler raises an error where a worker ended, of the same signal, say
            before.setdefault(number, signal.signal(number, signal.SIG_DFL))
        raise Interrupt

    def unraisable(failure: Any) -> None:
        if not issubclass(failure.exc_type, Interrupt):
            hook_before(failure)

    _INTERRUPTED.clear()
    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        yield
        return
    hook_before, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    if before.get(getattr(signal, "SIGHUP", None)) == signal.SIG_IGN:
        del before[signal.SIGHUP]  # under nohup
    _open_blocks += 1
    try:
        for number in list(before):
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in list(before.items()):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _open_blocks -= 1
        sys.unraisablehook = hook_before


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block no signal interrupts: it waits, and is delivered at the end of the block.

    For what must be done whole, and for libraries that turn an interrupt into an error of their own, as PyTorch's
    writer of files does. That a worker process ended is heard of later, too: PyTorch raises an error for it anywhere.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[int] = []
    before: dict[int, Any] = {}
    try:
        for number in (*_SIGNALS, *_OF_CHILDREN):
            handler = signal.getsignal(number)
            if callable(handler) or (handler == signal.SIG_DFL and number in _SIGNALS):
                before[number] = signal.signal(number, lambda number, _: noted.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(noted):
        if number in _SIGNALS:
            signal.raise_signal(number)


def was_interrupted() -> bool:
    """Whether a signal came within the last `interruptible` block, its `Interrupt` lost or not."""
    return _INTERRUPTED.is_set()


def raise_if_interrupted(*, settling: float = 0.0) -> None:
    """Take an interrupt that the interpreter lost: called now and then by whatever takes long.

    Args:
        settling: seconds to wait for it: a signal to all processes may reach worker processes first.
    """
    time.sleep(settling)
    if _INTERRUPTED.is_set():
        raise Interrupt


def ignore_signals() -> None:
    """From now on: for the last moments of a process, when its work is done and said."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _in_child() -> None:
    _INTERRUPTED.clear()
    if _open_blocks:
        with suppress(ValueError):  # the process was forked by another thread than the main one
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
