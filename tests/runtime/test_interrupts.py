"""Signals: what they raise, what they wait for, and whom they leave alone."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from cka_probe.images.loading_time import explaining_lost_workers
from cka_probe.runtime import interrupts
from cka_probe.runtime.interrupts import (
    Interrupt,
    interruptible,
    raise_if_interrupted,
    uninterrupted,
    was_interrupted,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """The handlers of a program in a terminal: under nohup, or in the background of a script, two are ignored."""
    set_to = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL)
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, set_to, strict=True)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_the_death_of_workers_is_not_heard_of_while_an_interrupt_is_dealt_with() -> None:
    def worker_died(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGCHLD)

    before = signal.signal(signal.SIGCHLD, worker_died)
    try:
        with pytest.raises(Interrupt), interruptible():
            work()
        assert signal.getsignal(signal.SIGCHLD) == worker_died
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_interrupt_and_the_handlers_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupt), interruptible():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    assert was_interrupted()
    with interruptible():
        assert not was_interrupted(), "that was the one before"


def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not was_interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_disturb_what_the_first_one_started(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            saved.append("all")

    with pytest.raises(Interrupt), interruptible():
        work()
    assert saved == ["all"]
    monkeypatch.setattr(interrupts, "_PATIENCE_S", 0.0)
    with interruptible():
        for _ in range(2):  # one that was lost is not the last
            with pytest.raises(Interrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_signals_wait_until_a_block_is_done() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
            with uninterrupted():
                done.append("second")
            done.append("third")
        done.append("never")

    with pytest.raises(Interrupt), interruptible():
        work()
    assert done == ["first", "second", "third"]


def test_signals_wait_in_a_program_of_the_user_s_too() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
        done.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["first"]


def test_an_error_in_a_block_that_cannot_be_interrupted_passes() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interrupt_that_the_interpreter_loses_is_not_printed_and_taken_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Lost:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def work() -> None:
        lost = Lost()
        del lost
        raise_if_interrupted()

    with pytest.raises(Interrupt), interruptible():
        work()
    assert capsys.readouterr().err == ""


def test_an_error_of_a_worker_that_the_signal_killed_is_the_interrupt() -> None:
    def loader() -> object:
        yield 1
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupt:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.") from None

    with pytest.raises(Interrupt), interruptible():
        assert list(explaining_lost_workers(loader())) == [1]  # type: ignore[arg-type]
    with interruptible(), pytest.raises(RuntimeError, match="something else"):
        next(explaining_lost_workers(_failing()))


def _failing() -> object:
    raise RuntimeError("something else")
    yield


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_worker_processes_ignore_ctrl_c_and_end_by_sigterm() -> None:
    with interruptible():
        child = os.fork()
        if not child:
            handlers = [signal.getsignal(number) for number in SIGNALS]
            os._exit(0 if handlers == [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_IGN] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sys.unraisablehook is not None
