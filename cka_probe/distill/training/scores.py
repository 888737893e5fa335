"""What the networks of a run score, each time on the part of the data that is meant for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import accuracy_of
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.methods.loss import Scored
from cka_probe.distill.options import Evaluation
from cka_probe.distill.preparation import Prepared
from cka_probe.distill.subjects import check_teacher
from cka_probe.distill.teacher_cache.cache import TeacherCache
from cka_probe.distill.training.best import AVERAGE, LAST
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.subset import Subset
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

TOP5_CLASSES = 6
"""Classes below which top-5 says nothing, and is left out."""

_ENOUGH_FOR_A_TEACHER = (
    2048  # training images that distinguish one that guesses from one that knows, of 1,000 classes too
)


class Scores:
    """The accuracies of a run.

    Args:
        ready: the networks and the parts of the data.
        config: how to evaluate.
        world: the processes.
        cache: knows the accuracy of the teacher, where it was measured before.

    Attributes:
        part: whose images each epoch is measured on: ``"validation"``, or ``"test"`` where nothing is decided.
        images: of that part.
    """

    def __init__(self, ready: Prepared, config: Training, world: World, cache: TeacherCache | None = None) -> None:
        self._ready, self._config, self._world, self._cache = ready, config, world, cache
        parts = ready.parts
        self.part, self.images = ("test", parts.test) if parts.validation is None else ("validation", parts.validation)

    def guard_teacher(self) -> dict[str, Any] | None:
        """Stop where the teacher guesses, judged by `cka_probe.images.parts.Parts.probed`, or by some of these.

        Returns:
            Its accuracy, of how many images of which part; None without a teacher whose logits are of
            the classes of the data.

        Raises:
            SpecError: it does not clearly beat chance.
        """
        if self._ready.teacher is None or not self._ready.scores_teacher:
            return None
        subject, images, part = self._ready.teacher.subject, self._ready.parts.probed, "validation"
        if images is self._ready.parts.train:
            part = "training"
            some = np.random.default_rng(self._config.seed).permutation(len(images))[:_ENOUGH_FOR_A_TEACHER]
            images = Subset(images, np.sort(some), images.name)
        top1 = self._teacher_on(images, part).top1
        logger.info("Teacher %s: top-1 %.2f%% of %d %s images.", subject.name, 100 * top1, len(images), part)
        check_teacher(subject.name, top1, len(self._ready.parts.classes), part)
        return {"part": part, "images": len(images), "top1": top1}

    def epoch(self, networks: Mapping[str, nn.Module], further: Mapping[str, Scored] | None = None) -> dict[str, float]:
        """The columns of the metrics that an epoch scores.

        Args:
            networks: the student as `LAST`, and the average of its weights as `AVERAGE`.
            further: other networks of the method, by name.
        """
        columns = {}
        for which, network in networks.items():
            accuracy = self._of(network, self._ready.student.subject, self.images)
            columns[f"{self.part}_top1{'_ema' if which == AVERAGE else ''}"] = accuracy.top1
            if which == LAST and self.has_top5:
                columns[f"{self.part}_top5"] = accuracy.top5
        for name, scored in (further or {}).items():
            side = self._ready.student if scored.sees == "student" else self._ready.teacher
            assert side is not None
            columns[f"{self.part}_top1_{name}"] = self._of(scored.network, side.subject, self.images).top1
        return columns

    def test_teacher(self) -> Accuracy | None:
        """The teacher's accuracy on the test images; None where its logits are not of the classes of the data."""
        if self._ready.teacher is None or not self._ready.scores_teacher:
            return None
        return self._teacher_on(self._ready.parts.test, "test")

    def _teacher_on(self, images: ImageSource, part: str) -> Accuracy:
        assert self._ready.teacher is not None
        which, subject = f"{len(images)} {part} images", self._ready.teacher.subject
        known = self._world.from_first(self._cache.accuracy(which) if self._cache is not None else None)
        if known is not None:
            return Accuracy(known["images"], known["top1"], known["top5"])
        accuracy = self._of(subject.network, subject, images)
        if self._cache is not None and self._world.writes:
            self._cache.keep_accuracy(which, {"images": accuracy.images, "top1": accuracy.top1, "top5": accuracy.top5})
        return accuracy

    def test(self, network: nn.Module, subject: Subject) -> Accuracy:
        """The accuracy on the test images."""
        return self._of(network, subject, self._ready.parts.test)

    def outcome(self, accuracy: Accuracy) -> dict[str, Any]:
        """What run.yaml says of the accuracy on the test images."""
        top5 = accuracy.top5 if self.has_top5 else None
        return {"top1": accuracy.top1, "top1_interval": list(accuracy.interval()), "top5": top5}

    @property
    def has_top5(self) -> bool:
        """Whether there are classes enough for top-5."""
        return len(self._ready.parts.classes) >= TOP5_CLASSES

    def _of(self, network: nn.Module, subject: Subject, images: ImageSource) -> Accuracy:
        config = self._config
        if self._ready.accuracy is not None and subject is self._ready.student.subject:
            known = self._ready.accuracy(network, images)
            if known is not None:
                return known
        options = Evaluation(
            batch_size=config.batch_size, workers=config.workers, bf16=config.bf16, fp16=config.fp16
        )  # fmt: skip
        return accuracy_of(subject, images, self._world, options, network)
