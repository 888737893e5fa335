"""OBoW: online bag-of-visual-words generation (Gidaris et al. 2021, arXiv 2012.11552), without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Fixed, Suppress

from cka_probe.distill.methods.method import Needs
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range, flag, shown

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
    from cka_probe.images.multi_crop import MultiCrop
    from cka_probe.networks.models import Subject


@dataclass(frozen=True, kw_only=True)
class OBoW(BagMethod):
    """The student predicts, from small crops, the bag of words of the whole image by its own moving average.

    Labels have no part in it, and class folders are not needed. The classifier of the student stays as it is.
    """

    name = "obow"
    summary = (
        "OBoW (Gidaris et al. 2021): pretraining without labels; from crops, the student predicts which visual words "
        "of its own moving average an image holds."
    )
    needs_teacher = False
    needs = Needs(student_stages=True)
    follows_student = True
    loss_options = ("kappa", "sharpness")

    ce_weight: Annotated[float, Range(0, 0), Suppress, Fixed] = 0.0
    """No labels are used."""

    crops: str | None = None
    """Number and size of the random crops of each image: 2x160. By default 2, of 5/7 of the student's image size."""

    patches: str | None = None
    """Number and size of smaller crops from a 3 × 3 grid: 5x96, or none. By default 5, of 3/7 of the student's image
    size."""

    reference: str | None = None
    """Model spec of a network, such as a supervised one, to compare the student with, before and after."""

    @property
    def uses_labels(self) -> bool:
        """See `Method.uses_labels`."""
        return False

    @property
    def models(self) -> tuple[str, ...]:
        """See `Method.models`."""
        return (self.reference,) if self.reference is not None else ()

    @classmethod
    def report_title(cls) -> str:
        """See `Method.report_title`."""
        return "Pretrained without labels by OBoW"

    def check(self) -> None:
        """As `BagMethod.check`; the crops must be written as they are."""
        from cka_probe.distill.bags.crop_sizes import MOST_CROPS
        from cka_probe.images.multi_crop import GRID, Crops

        super().check()
        if self.crops is not None and not Crops.parse(self.crops, "--crops", MOST_CROPS).count:
            raise SpecError("--crops must be how many and their size in pixels, such as 2x160, but is none.")
        if self.patches is not None:
            Crops.parse(self.patches, "--patches", GRID**2)

    def check_with(self, training: Training) -> None:
        """As `Method.check_with`; what makes the common augmentation has no part in it."""
        super().check_with(training)
        if training.teacher is not None:
            raise SpecError(
                f"--method {self.name} has no --teacher: it is the student's own moving average. To learn from the "
                "words of another network, use --method words; to be compared with one, --reference."
            )
        for name in ("crop_scale", "crop_ratio", "color_jitter", "rand_augment", "erasing"):
            if getattr(training, name) != getattr(type(training), name):
                raise SpecError(
                    f"--method {self.name} has augmentation of its own, but {flag(name)} is "
                    f"{shown(getattr(training, name))}. Leave it out; --crops and --patches say what it cuts."
                )

    def views(self, student: Subject, training: Training) -> MultiCrop | None:
        """See `Method.views`."""
        from cka_probe.distill.bags.crop_sizes import crops_for
        from cka_probe.images.multi_crop import MultiCrop

        return MultiCrop(student.preprocessing, *crops_for(student, self.crops, self.patches), training.flip)

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from cka_probe.distill.bags.levels import levels_of
        from cka_probe.distill.bags.loss import FollowingLoss
        from cka_probe.distill.evaluation.frozen_features import feature_layer

        assert setting.teacher is not None
        own = feature_layer(setting.student)
        levels = levels_of(setting.teacher, self.levels, "--student-layers")
        return FollowingLoss(self, setting, self.bags(setting, levels, own), ((own,), levels))

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.bags.loss import FollowingLoss
        from cka_probe.distill.methods.loss import pooled

        assert isinstance(loss, FollowingLoss)
        features = [pooled(taken[0], loss.student_layers[0]) for taken in seen.crops_taken]
        losses = loss.trained(features, loss.teacher_maps(seen))
        return dict(zip(("bag_crops", "bag_patches"), losses, strict=False))
