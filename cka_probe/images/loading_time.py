"""Waiting for images: for how long, to say when more should be decoded at once, and for processes that died."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from cka_probe.errors import DataError
from cka_probe.runtime.interrupts import raise_if_interrupted

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MUCH = 0.2
_SETTLING_SECONDS = 0.2
_LEAST_SECONDS = 5.0  # of a run, below which nobody minds


class TimedBatches(Generic[T]):
    """Hands out batches, and measures for how long they were waited for, the first left out: workers start with it.

    Args:
        batches: of images.
        device: that works on them. A GPU has its work ahead of it, so that a wait counts only where it ran out.
    """

    def __init__(self, batches: Iterable[T], device: torch.device) -> None:
        self._batches: Iterator[T] = iter(batches)
        self._device = device
        self._first: float | None = None
        self._waited = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        batch = next(self._batches)
        if self._first is None:
            self._first = time.perf_counter()
        elif self._device.type != "cuda" or torch.cuda.current_stream(self._device).query():
            self._waited += time.perf_counter() - started
        return batch

    def share(self) -> float:
        """The share of the time since the first batch that was spent waiting, 0 to 1."""
        if self._first is None:
            return 0.0
        return self._waited / max(time.perf_counter() - self._first, 1e-9)

    def log(self, workers: int) -> None:
        """Warn where the images were the bottleneck."""
        if self._first is None or time.perf_counter() - self._first < _LEAST_SECONDS:
            return
        share = self.share()
        if share > _MUCH:
            logger.warning(
                "The networks waited for images in %.0f%% of the time. Use more --workers than %d, if there are "
                "free cores, or smaller images.", 100 * share, workers,
            )  # fmt: skip


def explaining_lost_workers(batches: Iterable[T]) -> Generator[T, None, None]:
    """The batches of a loader; that one of its processes ended before its time is a `DataError`, or an interrupt.

    What is raised there comes as a message, so only what ends a process at once is left: the system, or a user's code.
    """
    coming = iter(batches)
    while True:
        try:
            batch = next(coming)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise_if_interrupted(settling=_SETTLING_SECONDS)
            raise DataError(
                "A worker process that loads images ended unexpectedly. It may have run out of memory (use fewer "
                "--workers), or a view or the data set ended it. --workers 0 loads without workers and shows the error."
            ) from error
        yield batch
