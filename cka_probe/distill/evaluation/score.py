"""How many images a network names right, with the uncertainty of so many images, and which classes it confuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.images.preprocessing import Preprocessing

if TYPE_CHECKING:
    from cka_probe.distill.evaluation.images import EvaluatedImages


LEAST_CLASSES_OF_TOP5 = 6
"""With fewer classes than this, top-5 is not shown: with five, it is always 100%."""


@dataclass(frozen=True)
class Accuracy:
    """The outcome of an evaluation.

    Attributes:
        images: how many.
        top1: share whose class got the largest logit.
        top5: share whose class is among the five largest; among all, where there are fewer. NaN where no logits were
            compared.
        episodes: the share of each few-shot episode, whose mean is ``top1``; none where it was no such evaluation.
    """

    images: int
    top1: float
    top5: float
    episodes: tuple[float, ...] = field(default=(), repr=False)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The Wilson score interval of `top1`: the network fixed, the images drawn.

        Of few-shot episodes it is that of their mean by Student's t: the images fixed, the episodes drawn.

        >>> low, high = Accuracy(100, 0.9, 1.0).interval()
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
        """
        from scipy.stats import binomtest, t

        if self.episodes:
            count = len(self.episodes)
            half = float(t.ppf((1 + level) / 2, count - 1) * np.std(self.episodes, ddof=1) / np.sqrt(count))
            return self.top1 - half, self.top1 + half
        low, high = binomtest(round(self.top1 * self.images), self.images).proportion_ci(level, method="wilson")
        return float(low), float(high)


@dataclass(frozen=True)
class Score:
    """What a network says of images.

    Attributes:
        name: of the network.
        accuracy: its outcome.
        labels: the class of each image, (n,) int64.
        predicted: the class of its largest logit, (n,) int64; the number of classes where it is none of the data's.
        classes: of the data, in the order of the labels.
        matched: how they were matched with the network's.
        images: what was measured.
        sees: from an image to the network's input.
        source: where the network comes from.
        by: ``"logits"``, or what named the images by its features; ``matched`` then says more.
    """

    name: str
    accuracy: Accuracy
    labels: NDArray[np.int64] = field(repr=False, compare=False)
    predicted: NDArray[np.int64] = field(repr=False, compare=False)
    classes: tuple[str, ...] = field(repr=False)
    matched: str
    images: EvaluatedImages = field(repr=False, compare=False)
    sees: Preprocessing
    source: Mapping[str, Any] = field(repr=False, compare=False)
    by: str = "logits"

    @property
    def how(self) -> str:
        """How the images got their classes, for a reader."""
        return f"{'matched' if self.by == 'logits' else 'named'} {self.matched}"

    @property
    def top1(self) -> float:
        """Share whose class got the largest logit."""
        return self.accuracy.top1

    @property
    def top5(self) -> float:
        """Share whose class is among the five largest logits; among all, where there are fewer."""
        return self.accuracy.top5

    @property
    def has_top5(self) -> bool:
        """Whether there is a top-5 that says anything: from six classes on."""
        return len(self.classes) >= LEAST_CLASSES_OF_TOP5 and not isnan(self.top5)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Images by their class (rows) and the predicted one (columns), (classes, classes).

        Where a network with more classes than the data predicts one of those, there is a last column for them.
        """
        rows, columns = len(self.classes), len(self.classes) + bool((self.predicted == len(self.classes)).any())
        counts = np.bincount(self.labels * columns + self.predicted, minlength=rows * columns)
        return counts.astype(np.int64).reshape(rows, columns)

    def by_class(self) -> list[Accuracy]:
        """The accuracy on the images of each class; NaN where there are none. `Accuracy.top5` is NaN."""
        images = np.bincount(self.labels, minlength=len(self.classes))
        right = np.bincount(self.labels[self.labels == self.predicted], minlength=len(self.classes))
        return [
            Accuracy(count, hits / count if count else nan, nan)
            for count, hits in zip(images.tolist(), right.tolist(), strict=True)
        ]
