"""Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import FeatureMethod, Needs
from cka_probe.errors import DataError
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs


@dataclass(frozen=True, kw_only=True)
class CRD(FeatureMethod):
    """Cross-entropy, and the contrast of each image's embedding with a memory of the other network's.

    The memory is a `cka_probe.distill.memory_bank.MemoryBank`; checkpoints keep it.
    """

    name = "crd"
    summary = (
        "Contrastive representation distillation (Tian et al. 2020): each image's embedding against a memory of others."
    )
    needs = Needs(features=True)

    feature_weight: Annotated[float, Range()] = 0.8
    """Of the contrast in either direction; in runs of a few epochs, less is better."""

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from cka_probe.distill.memory_bank import MemoryBank
        from cka_probe.distill.methods.loss import MethodLoss, last_stages, pooled_width

        if setting.images < 2:
            raise DataError("--method crd contrasts training images, but there is only one. Give it more images.")
        student, teacher = last_stages(setting)
        widths = pooled_width(student[0]), pooled_width(teacher[0])
        bank = MemoryBank(*widths, images=setting.images, seed=setting.config.seed)
        return MethodLoss(self, setting, bank, (student, teacher), pools=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        parts = super().parts(loss, seen)
        for name, contrast in loss.trained(*loss.pooled(seen), seen.indices).items():
            parts[name] = self.feature_weight * contrast
        return parts
