"""The words of a foreign teacher: OBoW's vocabulary on the maps of any network. Ours; no paper has it.

QuEST (Jain et al. 2020, arXiv 1912.01540) distils by visual words too, of a k-means before the training and location by
location, so that both networks need the same grid. Here the vocabulary is made while the training runs, and a bag has
no locations: grids and widths need not match, and labels are optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import Needs
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs


@dataclass(frozen=True, kw_only=True)
class Words(BagMethod):
    """Cross-entropy, and the bag of the teacher's visual words, predicted from the student's features.

    With ``ce_weight`` 0 labels have no part in it, and class folders are not needed.
    """

    name = "words"
    summary = (
        "The student predicts which visual words of the teacher an image holds (ours, with OBoW's vocabulary). Labels "
        "are optional: --ce-weight 0."
    )
    needs = Needs(teacher_stages=True)
    loss_options = ("bag_weight", "kappa", "sharpness")

    bag_weight: Annotated[float, Range()] = 1.0
    """Of the loss between the teacher's bag and the student's prediction."""

    @property
    def uses_labels(self) -> bool:
        """See `Method.uses_labels`."""
        return self.ce_weight > 0

    @classmethod
    def report_title(cls) -> str:
        """See `Method.report_title`."""
        return "Distilled by visual words"

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from cka_probe.distill.bags.levels import levels_of
        from cka_probe.distill.evaluation.frozen_features import feature_layer
        from cka_probe.distill.methods.loss import MethodLoss

        assert setting.teacher is not None
        own = feature_layer(setting.student)
        levels = levels_of(setting.teacher, self.levels, "--teacher-layers")
        return MethodLoss(self, setting, self.bags(setting, levels, own), ((own,), levels))

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.methods.loss import pooled

        features = pooled(seen.taken[0], loss.student_layers[0])
        (bag,) = loss.trained([features], loss.teacher_maps(seen))
        own = super().parts(loss, seen) if self.uses_labels else {}
        return {**own, "bag": self.bag_weight * bag}
