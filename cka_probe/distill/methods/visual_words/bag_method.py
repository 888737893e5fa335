"""Options of the methods whose student predicts bags of visual words of a teacher's maps."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from cka_probe.distill.methods.method import Method
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import COUNT, Range, shown

if TYPE_CHECKING:
    from cka_probe.activations.trace import TracedLayer
    from cka_probe.distill.bags.prediction import BagPrediction
    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import Setting


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BagMethod(Method):
    """A method with the online vocabulary, the bags and the dynamic head of OBoW.

    Attributes:
        named_levels: what ``--levels`` may be beside numbers.
    """

    named_levels: ClassVar[tuple[str, ...]] = ("last",)

    levels: str = "last"
    """Stages whose maps become words: numbers such as 3,4, or last, the last two of those whose maps are 5 × 5 or
    larger."""

    words: Annotated[int | None, Range(1, 10**6, whole=True, optional=True)] = None
    """Words per level, a multiple of --batch-size × processes. By default a quarter of the training images, at most
    8192."""

    sharpness: Annotated[float, Range(open_low=True)] = 15.0
    """Sharpness of the codes: the paper's 1/δ, divided by the mean distance of a location to its nearest word."""

    kappa: Annotated[float, Range(open_low=True)] = 8.0
    """Scale of the logits that predict the bag."""

    score_every: Annotated[int, COUNT] = 10
    """Epochs between two scores by nearest neighbours (kNN), if the training uses no labels but the data have them."""

    @property
    def score_epochs(self) -> int:
        """See `Method.score_epochs`."""
        return 1 if self.uses_labels else self.score_every

    def check(self) -> None:
        """As `Options.check`; the levels must be written as they are."""
        super().check()
        if self.levels not in self.named_levels and not re.fullmatch(r"[0-9]{1,4}( *, *[0-9]{1,4})*", self.levels):
            named = " or ".join(self.named_levels)
            raise SpecError(f"--levels must be {named}, or numbers such as 3,4, but is {shown(self.levels)}.")

    def check_with(self, training: Training) -> None:
        """As `Method.check_with`; maps are not stored."""
        super().check_with(training)
        if training.teacher_cache is not None:
            raise SpecError(
                f"--teacher-cache stores logits and pooled features, but --method {self.name} needs maps of the "
                "teacher. Train without a cache."
            )

    def bags(self, setting: Setting, levels: tuple[TracedLayer, ...], student: TracedLayer) -> BagPrediction:
        """Vocabularies and heads.

        Args:
            setting: what they are built for.
            levels: of the teacher.
            student: the layer of its features.

        Raises:
            SpecError: ``--words`` is no multiple of a step's images.
        """
        from cka_probe.distill.bags.dynamic_head import DynamicHead
        from cka_probe.distill.bags.levels import word_count
        from cka_probe.distill.bags.prediction import BagPrediction
        from cka_probe.distill.bags.vocabulary import Vocabulary
        from cka_probe.distill.methods.loss import pooled_width
        from cka_probe.distill.training.gathering import position

        assert setting.teacher is not None
        config = setting.config
        words = word_count(self.words, setting.images, config.batch_size * position()[1])
        logger.info(
            "Words: %d each of %s of %s; a student's feature is %s.", words,
            " and ".join(
                f"{level.name} ({' × '.join(map(str, setting.teacher.shape_of(level).grid))})" for level in levels
            ),
            setting.teacher.name, student.name or "its output",
        )  # fmt: skip
        channels = [setting.teacher.shape_of(level).channels for level in levels]
        return BagPrediction(
            [Vocabulary(words, count, sharpness=self.sharpness, seed=config.seed) for count in channels],
            [DynamicHead(count, pooled_width(student), kappa=self.kappa) for count in channels],
        )
