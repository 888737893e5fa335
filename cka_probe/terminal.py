"""What the command line does to its terminal: progress, messages, Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_INTERRUPTED = threading.Event()


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, as a class of its own: see `interruptible`."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM, by which schedulers end a job, raise `Interrupt`.

    After a plain KeyboardInterrupt that passed through `exec` of a string, as dataclasses do while packages are
    imported, CPython kills its process at the end by SIGINT, even where the interrupt was caught. And one that falls
    into a callback of the interpreter's own is printed and lost: `raise_if_interrupted` takes it at the next batch.
    """

    def interrupt(*_: object) -> None:
        _INTERRUPTED.set()
        raise Interrupt

    _INTERRUPTED.clear()

    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """Take an interrupt that the interpreter lost: called now and then by whatever takes long."""
    if _INTERRUPTED.is_set():
        raise Interrupt


class Progress:
    """Images done, rate and time left, on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._started = self._told = 0.0  # at the first batch: the rate does not count the loading of the networks
        self._first = 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        raise_if_interrupted()
        if self._terminal:
            if self._bar is None:
                from tqdm import tqdm

                # The first batch, and what a run before this one did, are no part of the rate: a mean, not the last.
                self._bar = tqdm(total=total, initial=done, unit=" images", file=sys.stderr, smoothing=0)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not self._first:
            self._started = self._told = now
            self._first = done
        if done == total or now - self._told >= 10:
            rate = (done - self._first) / max(now - self._started, 1e-9)
            told = f", {rate:.1f} a second" if rate else ""
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            print(f"{done} of {total} images{told}{left}", file=sys.stderr, flush=True)
            self._told = now


class _Handler(logging.Handler):
    """Messages on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + self.format(record), file=sys.stderr)


def log_to_stderr() -> None:
    """The package's messages, of progress and warnings, on standard error."""
    package = logging.getLogger("cka_probe")
    if not package.handlers:
        package.addHandler(_Handler())
    package.setLevel(logging.INFO)
    package.propagate = False


def log_nothing() -> None:
    """Leave the messages to another process of the run."""
    logging.getLogger("cka_probe").setLevel(logging.CRITICAL)
