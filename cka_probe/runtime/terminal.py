"""What the command line does to its terminal: results, progress, messages, and nothing that could harm it."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cka_probe.runtime.interrupts import Interrupt, interruptible, raise_if_interrupted, uninterrupted

__all__ = [
    "Interrupt",
    "Progress",
    "finish_streams",
    "interruptible",
    "is_terminal",
    "log_nothing",
    "log_to_stderr",
    "open_streams",
    "print_message",
    "print_result",
    "quiet_libraries",
    "raise_if_interrupted",
    "rewrite_line",
    "stdout_has_reader",
    "uninterrupted",
    "visible",
]

_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, escapes among them; what turns the direction of writing; surrogates, which no encoding takes."""

_LOUD_LIBRARIES = ("huggingface_hub", "torch", "timm", "PIL", "matplotlib")
"""Loggers that have a handler of their own, or a level."""


def visible(text: str) -> str:
    r"""A text on one line, with what a terminal would obey shown as its code.

    >>> visible("conv1\x1b[2J\n")
    'conv1\\x1b[2J\\n'
    """
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def print_result(text: str = "") -> None:
    """Print a line of results to standard output. It never raises: `finish_streams` returns whether it went well."""
    _STDOUT.write(f"{visible(text)}\n")
    _STDOUT.flush()


def print_message(text: str) -> None:
    """Print a message to standard error, in one line; line breaks become spaces. It never raises."""
    _STDERR.write(f"{visible(' '.join(text.split()))}\n")
    _STDERR.flush()


class _Stream:
    """Standard output or standard error, whichever it is now; once it cannot be written, what is written is dropped."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._broken: Any = None
        self.error: Exception | None = None
        self.rewritten = False  # whether its line holds what `rewrite_line` put there

    def __getattr__(self, name: str) -> Any:  # what tqdm asks for: encoding, fileno
        return getattr(self._stream, name)

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, OSError, ValueError):  # None, or closed
            return False

    def write(self, text: str) -> int:
        stream = self._stream
        if stream is not None and stream is not self._broken:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                self._try(lambda: stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        stream = self._stream
        if stream is not None and stream is not self._broken:
            self._try(stream.flush)

    def restart(self) -> None:
        """Forget what went wrong."""
        self._broken = self.error = None
        self.rewritten = False

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._broken, self.error = self._stream, error
        # What is left in Python's buffer would fail again, with a traceback, when the process ends.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


_STDOUT, _STDERR = _Stream("stdout"), _Stream("stderr")


def open_streams() -> None:
    """Make the standard streams usable: closed ones lead nowhere, and no character is an error.

    Where one is closed, the first file that is opened would get its number, and what libraries print would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            stream = open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    writers: list[Any] = [sys.stdout, sys.stderr]
    for writer in writers:
        with suppress(AttributeError, ValueError, OSError):  # of a notebook, or closed
            writer.reconfigure(errors="backslashreplace")
    _STDOUT.restart()
    _STDERR.restart()


def finish_streams() -> Exception | None:
    """Write out what is buffered; the error where standard output could not be written, unless its reader is gone."""
    _STDOUT.flush()
    _STDERR.flush()
    return None if isinstance(_STDOUT.error, BrokenPipeError) else _STDOUT.error


def stdout_has_reader() -> bool:
    """Whether standard output can be written still: not where it is a pipe whose reader has gone."""
    _STDOUT.flush()
    if isinstance(_STDOUT.error, BrokenPipeError):
        return False
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows, or no file
        return True


class Progress:
    """Images done, rate and time left, on standard error: a bar on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._started = self._printed = 0.0  # at the first batch: the rate does not count the loading of the networks
        self._first = 0
        self._terminal = _STDERR.isatty()

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
                self._bar = tqdm(
                    total=total, initial=done, unit=" images", file=_STDERR, smoothing=0, dynamic_ncols=True
                )
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not self._first:
            self._started = self._printed = now
            self._first = done
        if done == total or now - self._printed >= 10:
            rate = (done - self._first) / max(now - self._started, 1e-9)
            speed = f", {rate:.1f} a second" if rate else ""
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            print_message(f"{done} of {total} images{speed}{left}")
            self._printed = now


def rewrite_line(text: str) -> None:
    """Put a text into the line of a terminal that standard error is at, in place of what stands there.

    A message that comes after it takes its line.
    """
    _STDERR.write(f"\r\033[K{visible(text)}")
    _STDERR.flush()
    _STDERR.rewritten = True


def is_terminal() -> bool:
    """Whether standard error is one."""
    return _STDERR.isatty()


class _Handler(logging.Handler):
    """Messages on standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if _STDERR.rewritten:
            _STDERR.write("\r\033[K")
            _STDERR.rewritten = False
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + visible(" ".join(self.format(record).split())), file=_STDERR)


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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, Python warnings and the messages of other packages' loggers below errors are not shown.

    They speak of the libraries' own workings, which a user of the command line cannot change. Warnings that a filter
    turns into errors (``-W error``) stay errors.
    """

    def drop(message: Warning | str, *_: Any, **__: Any) -> None:
        logging.getLogger(__name__).debug("%s", message)

    root, handler = logging.getLogger(), _Handler(logging.ERROR)
    loggers = [logging.getLogger(name) for name in _LOUD_LIBRARIES]
    levels = [logger.level for logger in loggers]
    show, warnings.showwarning = warnings.showwarning, drop
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.showwarning = show
        root.removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
