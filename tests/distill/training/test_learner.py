"""The learning rate of each update is what the options say."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from cka_probe.distill.config import Training
from cka_probe.distill.training.learner import make_optimizer, make_schedule

UPDATES = 10


def rates(**options: Any) -> list[float]:
    """The learning rate with which each update of a run is done, and the one after its end."""
    config = Training(student="s", method="none", lr=0.5, min_lr=0.01, warmup_lr=0.1, **options)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    found = []
    for update in range(config.epochs * UPDATES + 1):
        make_schedule(optimizer, config, UPDATES, update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("schedule", ["cosine", "step", "none"])
def test_the_rate_is_lr_where_the_warm_up_ends(schedule: str) -> None:
    found = rates(epochs=10, warmup_epochs=4, schedule=schedule, decay_epochs=6)
    assert found[0] == pytest.approx(0.1)
    assert found[20] == pytest.approx(0.3)  # half-way
    assert found[40] == pytest.approx(0.5)
    assert found[70] == pytest.approx({"cosine": (0.5 + 0.01) / 2, "step": 0.05, "none": 0.5}[schedule])
    assert found[100] == pytest.approx({"cosine": 0.01, "step": 0.05, "none": 0.5}[schedule])
    assert max(found) == pytest.approx(0.5)


def test_a_warm_up_may_take_the_whole_run() -> None:
    found = rates(epochs=2, warmup_epochs=2)
    assert found[10] == pytest.approx(0.3)
    assert found[19] == pytest.approx(0.48)


def test_without_a_warm_up_the_cosine_is_timm_s_own() -> None:
    found = rates(epochs=4)
    assert (found[0], found[20], found[40]) == pytest.approx((0.5, 0.255, 0.01))
