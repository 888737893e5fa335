"""Which weights are the better ones, by the validation images: of an epoch, and of all epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

LAST, AVERAGE = "last", "average"
"""The weights that training has come to, and the moving average of them."""

_MOST_INITIAL = 0.05


@dataclass(frozen=True)
class Best:
    """The weights with the best validation top-1 so far, the first of equals.

    Attributes:
        epoch: that they are of, from 1.
        weights: `LAST` or `AVERAGE`.
        top1: of the validation images.
        state: the weights, on the CPU; on the process that writes alone.
    """

    epoch: int
    weights: str
    top1: float
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Best | None:
        """What `state` gave."""
        return None if state is None else cls(**state)

    def plain(self) -> dict[str, Any]:
        """What `of` needs."""
        return {"epoch": self.epoch, "weights": self.weights, "top1": self.top1, "state": dict(self.state)}


def better(row: Mapping[str, Any]) -> tuple[str, float | None]:
    """Which weights of an epoch are kept, and their validation top-1; of equals the average.

    Args:
        row: of the metrics. Without validation images, the average is kept where there is one.

    >>> better({"validation_top1": 0.5, "validation_top1_ema": 0.4})
    ('last', 0.5)
    """
    last, average = row.get("validation_top1"), row.get("validation_top1_ema")
    if last is None:
        return (AVERAGE if "test_top1_ema" in row else LAST), None
    return (LAST, last) if average is None or average < last else (AVERAGE, average)


def out_of_patience(best: Best | None, epoch: int, patience: int | None) -> bool:
    """Whether so many epochs have brought no better validation top-1.

    Args:
        best: so far.
        epoch: the last one that has ended, from 1.
        patience: epochs; None for any number.
    """
    if patience is None or best is None or epoch - best.epoch < patience:
        return False
    logger.info("Stopped after epoch %d: validation top-1 is no better since epoch %d (--patience).", epoch, best.epoch)
    return True


def warn_if_slow(decay: float, updates: int) -> None:
    """Say where an average is slower than the training: its decay grows to ``1 - updates ** (-2 / 3)`` at most.

    Args:
        decay: as asked for.
        updates: of the whole run.
    """
    reached = 1 - updates ** (-2 / 3)
    if reached >= decay:
        return
    grown = f"Its decay grows from 0, as in timm, and reaches {reached:.4g} in the {updates:,} updates of this run"
    left = decay**updates
    if left > _MOST_INITIAL:
        fits = f"{_MOST_INITIAL ** (1 / updates):.2g}"
        logger.warning(
            "--ema %g is slower than the run: at that decay the average would hold %.0f%% of the initial weights. %s. "
            "--ema %s or less fits.", decay, 100 * left, grown, fits,
        )  # fmt: skip
    else:
        logger.info("--ema %g: %s.", decay, grown[0].lower() + grown[1:])
