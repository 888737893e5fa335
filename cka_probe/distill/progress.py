"""Where a training is, and the line that tells it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cka_probe.interrupts import raise_if_interrupted
from cka_probe.terminal import is_terminal, rewrite_line, tell


@dataclass(frozen=True)
class Live:
    """Where a training is: handed to ``progress`` at each look.

    Attributes:
        epoch: under way, from 1.
        epochs: in all.
        images_per_second: in this epoch.
        seconds_left: at that rate, evaluations left out.
        parts: of the loss, their means in this epoch.
        top1: at the end of the last epoch; None before.
    """

    epoch: int
    epochs: int
    images_per_second: float
    seconds_left: float
    parts: dict[str, float]
    top1: float | None


Progress = Callable[[Live], None]


class LiveLine:
    """Epoch, parts of the loss, accuracy, images a second, time left: on one line of a terminal, else now and then."""

    def __init__(self) -> None:
        self._terminal = is_terminal()
        self._told = 0.0

    def __call__(self, live: Live) -> None:
        raise_if_interrupted()
        now = time.monotonic()
        if now - self._told < (0.2 if self._terminal else 10):
            return
        self._told = now
        parts = ", ".join(f"{name} {value:.3f}" for name, value in live.parts.items())
        top1 = f", top-1 {live.top1:.2%}" if live.top1 is not None else ""
        minutes, seconds = divmod(round(live.seconds_left), 60)
        line = (
            f"epoch {live.epoch} of {live.epochs}: {parts}{top1}, {live.images_per_second:.0f} images a second, "
            f"{minutes}:{seconds:02d} left"
        )
        (rewrite_line if self._terminal else tell)(line)
