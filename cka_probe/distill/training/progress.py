"""How far a training is, and the lines that show it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cka_probe.runtime.interrupts import raise_if_interrupted
from cka_probe.runtime.terminal import is_terminal, print_message, rewrite_line

if TYPE_CHECKING:
    import torch

_NO_PARTS = re.compile(
    r"epoch|updates|lr|loss|train_top1|images_per_second|(validation_|test_)?top[15](_\w+)?|(validation_|test_)knn"
)

_WARM, _TIMED = 2, 8


def is_part(column: str) -> bool:
    """Whether a column of the metrics is a part of the loss; top1 without a part of the data is of version 0.1.

    >>> is_part("kd"), is_part("validation_top1"), is_part("test_top1_assistant")
    (True, False, False)
    """
    return not _NO_PARTS.fullmatch(column)


@dataclass(frozen=True)
class Live:
    """Where a training is: handed to ``progress`` at each look.

    Attributes:
        epoch: under way, from 1.
        epochs: in all.
        images_per_second: in this epoch.
        seconds_left: at that rate, evaluations left out.
        parts: of the loss, their means in this epoch.
        top1: of the validation images at the end of the last epoch; None before, and without such images.
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
        self._told = 0.0 if self._terminal else time.monotonic()

    def __call__(self, live: Live) -> None:
        raise_if_interrupted()
        now = time.monotonic()
        if now - self._told < (0.2 if self._terminal else 10):
            return
        self._told = now
        parts = ", ".join(f"{name} {value:.3f}" for name, value in live.parts.items())
        top1 = f", validation top-1 {live.top1:.2%}" if live.top1 is not None else ""
        line = (
            f"epoch {live.epoch} of {live.epochs}: {parts}{top1}, {live.images_per_second:.0f} images a second, "
            f"{clock(live.seconds_left)} left"
        )
        (rewrite_line if self._terminal else print_message)(line)


def epoch_line(row: Mapping[str, Any], epochs: int, seconds_left: float) -> str:
    """A row of the metrics as a line for the log.

    Args:
        row: of an epoch that has ended.
        epochs: in all.
        seconds_left: for the others.

    >>> row = {"epoch": 3, "lr": 4.5e-4, "loss": 1.2, "ce": 0.9, "kd": 0.3, "train_top1": 0.6, "validation_top1": 0.5}
    >>> epoch_line(row, 9, 12)
    'epoch 3 of 9: loss 1.200 (ce 0.900, kd 0.300), training top-1 60.0%, validation top-1 50.0%, lr 4.5e-04, 0:12 left'
    """
    parts = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if is_part(name))
    said = [f"epoch {row['epoch']} of {epochs}: loss {row['loss']:.3f} ({parts})"]
    said += [f"training top-1 {row['train_top1']:.1%}"] if "train_top1" in row else []
    for part in ("validation", "test"):
        if f"{part}_top1" in row:
            said.append(
                f"{part} top-1 {row[f'{part}_top1']:.1%}"
                + "".join(f" ({name} {row[column]:.1%})" for column, name in _further(part, row).items())
                + (" (for information only)" if part == "test" else "")
            )
        if f"{part}_knn" in row:
            said.append(f"{part} kNN {row[f'{part}_knn']:.1%}")
    return ", ".join([*said, f"lr {row['lr']:.1e}", f"{clock(seconds_left)} left"])


def _further(part: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Columns of accuracies beside the student's -> whose they are."""
    start = f"{part}_top1_"
    names = {column: column.removeprefix(start) for column in row if column.startswith(start)}
    return {column: {"ema": "average"}.get(name, name) for column, name in names.items()}


class Estimate:
    """How long the training will take and how much memory it uses, from its first steps in this process.

    The first two are not timed: they load libraries and compile.

    Args:
        epochs: to come.
        steps: an epoch.
        batches: that are evaluated after each; such a forward pass takes about a third of a step.
        device: that it runs on.
    """

    def __init__(self, epochs: int, steps: int, batches: float, device: torch.device) -> None:
        self._epochs, self._steps, self._batches, self._device = epochs, steps, batches, device
        self._warm = min(_WARM, steps - 1)
        self._until = min(self._warm + _TIMED, steps)
        self._done = 0
        self._started = time.perf_counter()

    def step(self) -> str:
        """Count a step; the estimate as a line for the log, once, when enough are done."""
        self._done += 1
        if self._done == self._warm:
            self._started = self._now()
        if self._done != self._until:
            return ""
        seconds = (self._now() - self._started) / (self._until - self._warm)
        whole = about(self._epochs * seconds * (self._steps + self._batches / 3))
        memory = self._memory()
        epochs, steps = (
            f"{count} {what}{'s' if count > 1 else ''}"
            for count, what in ((self._epochs, "epoch"), (self._steps, "step"))
        )
        return f"About {whole} for {epochs} of {steps}{f', with {memory}' if memory else ''}."

    def _memory(self) -> str:
        """The memory in use at the peak, in words; empty where it is not known."""
        if self._device.type == "cuda":
            import torch

            return f"{torch.cuda.max_memory_allocated(self._device) / 2**30:.1f} GiB of GPU memory"
        try:
            import resource
        except ImportError:  # Windows
            return ""
        unit = 1 if sys.platform == "darwin" else 1024
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def clock(seconds: float) -> str:
    """Seconds as on a clock.

    >>> clock(12), clock(3725)
    ('0:12', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def about(seconds: float) -> str:
    """Seconds, roughly, in words.

    >>> about(42), about(200), about(9000)
    ('42 seconds', '3 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
