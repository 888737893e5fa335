"""Waiting for images is measured, and told where it is much."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cka_probe.images import loading_time as waiting
from cka_probe.images.loading_time import TimedBatches

CPU = torch.device("cpu")


@pytest.mark.parametrize(("reading", "working", "told"), [(1.0, 1.0, True), (1.0, 9.0, False), (0.01, 0.1, False)])
def test_a_bottleneck_is_told_in_runs_that_take_long(
    reading: float, working: float, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: clock[0])

    def read() -> Iterator[int]:
        clock[0] += 1000  # workers that start
        for number in range(10):
            clock[0] += reading
            yield number

    batches = TimedBatches(read(), CPU)
    for _ in batches:
        clock[0] += working
    # Of ten batches, nine were waited for after the first, and all were worked on.
    assert batches.share() == pytest.approx(9 * reading / (9 * reading + 10 * working))
    batches.log(workers=3)
    assert ("Use more --workers than 3" in caplog.text) is told


def test_what_has_no_batches_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    empty: TimedBatches[int] = TimedBatches([], CPU)
    assert list(empty) == []
    assert empty.share() == 0
    empty.log(workers=1)
    assert caplog.text == ""
