"""The words of a foreign teacher: OBoW's vocabulary on the maps of any network. Ours; no paper has it.

QuEST (Jain et al. 2020, arXiv 1912.01540) distils by visual words too, of a k-means before the training and location by
location, so that both networks need the same grid. Here the vocabulary is made while the training runs, and a bag has
no locations: grids and widths need not match, and labels are optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.methods.method import Needs, StageWords
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
    from cka_probe.distill.probe import Decision
    from cka_probe.distill.subjects import Examined
    from cka_probe.results.similarity import Similarity


@dataclass(frozen=True, kw_only=True)
class Words(BagMethod, ByComparison):
    """Cross-entropy, and the bag of the teacher's visual words, predicted from the student's features.

    With ``ce_weight`` 0 labels have no part in it, and class folders are not needed.
    """

    name = "words"
    summary = (
        "The student predicts which visual words of the teacher an image holds (ours, with OBoW's vocabulary). Labels "
        "are optional: --ce-weight 0."
    )
    needs = Needs(student_stages=True, teacher_stages=True)
    decider = "--levels"
    named_levels = ("last", "auto")
    stage_words = StageWords("predicts the bags", "the teacher's layer whose words are taught", "Words")
    loss_options = ("bag_weight", "kappa", "sharpness")

    levels: str = "last"
    """Stages of the teacher whose maps become words: numbers such as 3,4; last, the last two of those whose maps are
    5 × 5 or larger; or auto, the one whose CKA with the student's last stage is the largest."""

    probe_epochs: Annotated[int, Range(0, 10**6, whole=True)] = 0
    """Epochs with labels alone before --levels auto measures. 0: the student is compared as given."""

    bag_weight: Annotated[float, Range()] = 1.0
    """Weight of the loss between the teacher's bag and the student's prediction."""

    @property
    def uses_labels(self) -> bool:
        """See `Method.uses_labels`."""
        return self.ce_weight > 0

    @classmethod
    def report_title(cls) -> str:
        """See `Method.report_title`."""
        return "Distilled by visual words"

    def check_with(self, training: Training) -> None:
        """As `ByComparison.check_with`; without labels nothing could be learned before the choice."""
        super().check_with(training)
        if self.measures_stages and self.probe_epochs and not self.uses_labels:
            raise SpecError("--probe-epochs are of labels alone, but --ce-weight is 0. Leave one of them out.")

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """See `ByComparison.decide`."""
        from cka_probe.distill.bags.decision import decide

        return decide(student, teacher, self, similarity)

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`; before the levels are chosen there are no words."""
        from cka_probe.distill.bags.loss import BagLoss
        from cka_probe.distill.evaluation.frozen_features import feature_layer
        from cka_probe.distill.methods.loss import MethodLoss

        if not setting.chosen:
            return MethodLoss(self, setting)
        assert setting.teacher is not None
        own = feature_layer(setting.student)
        levels = tuple(setting.teacher.layers[name] for name in setting.matches)
        return BagLoss(self, setting, self.bags(setting, levels, own), ((own,), levels))

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.bags.loss import BagLoss
        from cka_probe.distill.methods.loss import pooled

        own = super().parts(loss, seen) if self.uses_labels else {}
        if not isinstance(loss, BagLoss):
            return own
        features = pooled(seen.taken[0], loss.student_layers[0])
        (bag,) = loss.trained([features], loss.teacher_maps(seen))
        return {**own, "bag": self.bag_weight * bag}
