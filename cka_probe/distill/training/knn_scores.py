"""What the student of a training without labels scores: by the nearest neighbours of its features."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import nan
from typing import Any

import numpy as np
from torch import nn

from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.frozen_features import feature_layer, features_of
from cka_probe.distill.evaluation.probes import NEIGHBOURS, nearest_neighbours
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.options import Evaluation
from cka_probe.distill.preparation import Prepared
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.subset import Subset
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

MOST_KNOWN = 50_000
"""Training images whose classes are used; of more, so many are drawn."""


class KnnScores:
    """The kNN accuracies of a run whose training uses no labels; none where the data have no labels either.

    The classes of the training images vote for those of images that were set aside. They have no part in the training.

    Args:
        ready: the networks and the parts of the data.
        config: how to evaluate.
        world: the processes.

    Attributes:
        part: whose images an epoch is measured on: ``"validation"``, or ``"test"`` where there are none of these.
        images: of that part.
        has_top5: never.
    """

    has_top5 = False

    def __init__(self, ready: Prepared, config: Training, world: World) -> None:
        self._ready, self._config, self._world = ready, config, world
        parts = ready.parts
        self.part, self.images = ("test", parts.test) if parts.validation is None else ("validation", parts.validation)
        self._layer = feature_layer(ready.student.side)
        self._known = parts.train if parts.train_once is None else parts.train_once
        if len(self._known) > MOST_KNOWN:
            drawn = np.random.default_rng(config.seed).permutation(len(self._known))[:MOST_KNOWN]
            self._known = Subset(self._known, np.sort(drawn), self._known.name)
        if not parts.classes:
            logger.info("%s has no class folders: the student is not scored.", parts.train.name)

    def guard_teacher(self) -> None:
        """A teacher whose classes are not used is not judged by them."""

    def epoch(self, networks: Mapping[str, nn.Module], further: Mapping[str, Any] | None = None) -> dict[str, float]:
        """The columns of the metrics that an epoch scores; see `Scores.epoch`."""
        return {f"{self.part}_knn": self._of(self.images).top1} if self._ready.parts.classes else {}

    def test(self, network: nn.Module, subject: Subject) -> Accuracy | None:
        """The accuracy on the test images."""
        return self._of(self._ready.parts.test) if self._ready.parts.classes else None

    def test_teacher(self) -> None:
        """A teacher whose classes are not used has no accuracy."""

    def outcome(self, accuracy: Accuracy | None) -> dict[str, Any]:
        """What run.yaml says of the score on the test images."""
        if accuracy is None:
            return {"knn": None}
        return {
            "knn": {
                "top1": accuracy.top1, "interval": list(accuracy.interval()), "images": accuracy.images,
                "neighbours": NEIGHBOURS, "known": len(self._known), "layer": self._layer.name,
            }
        }  # fmt: skip

    def _of(self, images: ImageSource) -> Accuracy:
        config, subject = self._config, self._ready.student.subject
        options = Evaluation(
            batch_size=config.batch_size, workers=config.workers, bf16=config.bf16, fp16=config.fp16
        )  # fmt: skip
        known, asked = (
            features_of(subject, self._layer, source, self._world, options) for source in (self._known, images)
        )
        right = nearest_neighbours(known, asked) == asked.labels
        return Accuracy(len(right), float(right.mean()), nan)
