"""What a distillation method is: its options, and what the rest of the program must know of it.

Importing this loads nothing heavy, and neither does importing a method of the package: the command line reads options
and help texts alone. So a method imports PyTorch in the functions that use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from cka_probe.errors import SpecError
from cka_probe.probing.options import Options
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
    from cka_probe.images.multi_crop import MultiCrop
    from cka_probe.networks.models import Subject


@dataclass(frozen=True)
class Needs:
    """What a method asks of the networks; they are checked for it before the training, and for nothing else.

    Attributes:
        logits: those of the teacher, of the classes of the data.
        student_stages: stages of the student that put out maps or tokens.
        teacher_stages: stages of the teacher that do.
        features: the pooled features of the last stage of either network, which may be vectors.
    """

    logits: bool = False
    student_stages: bool = False
    teacher_stages: bool = False
    features: bool = False

    @property
    def layers(self) -> bool:
        """Whether layers of the networks are tapped."""
        return self.student_stages or self.teacher_stages or self.features


@dataclass(frozen=True)
class StageWords:
    """How a report speaks of the student's stages that take part.

    Attributes:
        chosen: what a stage that takes part is.
        pair: what a layer of the teacher that belongs to it is; "" where none does.
        pairs: begins the list of such pairs.
    """

    chosen: str
    pair: str = ""
    pairs: str = ""


@dataclass(frozen=True, kw_only=True)
class Method(Options):
    """A distillation method: a frozen value that holds its options.

    A new method is one file with a subclass of this, and one line in `METHODS`. Its fields are its options: each
    becomes a flag and an entry of run.yaml, with its range and the help text below it. Their names differ from those
    of `cka_probe.distill.config.Training`.

    Attributes:
        name: that ``--method`` knows.
        summary: for a list of all methods: its name, its paper, and what it does.
        needs_teacher: whether the training runs the teacher.
        needs: what it asks of the networks: everything, where it does not say.
        trains_heads: it can teach a classifier whose network stays as it is (``--train head``).
        follows_student: its teacher is a moving average of the student, and no network of its own.
        least_images: that the batches of all processes must hold together; more than one where images are related.
        loss_options: those that its own parts of the loss depend on.
        stage_words: for the report, where it takes part at stages.
        networks: names of further networks that it scores and compares.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(logits=True, student_stages=True, teacher_stages=True, features=True)
    trains_heads: ClassVar[bool] = False
    follows_student: ClassVar[bool] = False
    least_images: ClassVar[int] = 1
    loss_options: ClassVar[tuple[str, ...]] = ()
    stage_words: ClassVar[StageWords] = StageWords("takes part")
    networks: ClassVar[tuple[str, ...]] = ()

    ce_weight: Annotated[float, Range()] = 1.0
    """Weight of the cross-entropy with the labels."""

    @property
    def uses_labels(self) -> bool:
        """Whether it learns from labels.

        Without, class folders are no more needed, the student keeps its classifier as it is, and is scored by the
        nearest neighbours of its features, where the data have labels.
        """
        return True

    @property
    def score_epochs(self) -> int:
        """Epochs between two scores of the student; the last epoch has one."""
        return 1

    @property
    def models(self) -> tuple[str, ...]:
        """Specs of further networks that it names."""
        return ()

    @classmethod
    def report_title(cls) -> str:
        """How a student came about, for the head of its report."""
        return f"Distilled by {cls.name}"

    def check_with(self, training: Training) -> None:
        """Check the method together with the common options; `check` has checked its own.

        Raises:
            SpecError: they do not go together.
        """
        if self.needs_teacher and not training.teacher:
            raise SpecError(f"--method {self.name} needs a teacher: --teacher SPEC. Without one, use --method none.")

    def views(self, student: Subject, training: Training) -> MultiCrop | None:
        """The views of an image that it wants, in place of the common augmentation.

        Args:
            student: on its device.
            training: all options.

        Raises:
            SpecError: the student cannot see them.
        """
        return None

    def build(self, setting: Setting) -> MethodLoss:
        """What is trained beside the student, and the layers that the loss sees: nothing, unless a method says."""
        from cka_probe.distill.methods.loss import MethodLoss

        return MethodLoss(self, setting)

    def cautions(self, metrics: Sequence[Mapping[str, Any]], epochs: int) -> list[str]:
        """What to watch out for, in sentences for the log and the report.

        Args:
            metrics: a row an epoch, of those that have ended.
            epochs: of the whole run.
        """
        return []

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """The parts of the loss, each a scalar with its weight in it; their sum is minimized.

        Args:
            loss: that `build` made.
            seen: one batch.
        """
        from cka_probe.distill.losses import classification_loss

        return {"ce": self.ce_weight * classification_loss(seen.logits, seen.target, loss.smoothing)}


@dataclass(frozen=True, kw_only=True)
class LogitMethod(Method):
    """A method that compares final logits."""

    loss_options: ClassVar[tuple[str, ...]] = ("temperature", "kd_weight")

    temperature: Annotated[float, Range(0, 10**6, open_low=True)] = 1.0
    """Softmax temperature of teacher and student."""

    kd_weight: Annotated[float, Range()] = 1.0
    """Weight of the loss between the final logits."""


@dataclass(frozen=True, kw_only=True)
class SoftTargetMethod(LogitMethod):
    """A method whose targets are the teacher's probabilities, from logits that may be standardized."""

    standardize_logits: bool = False
    """Standardize the logits of teacher and student over the classes before the softmax (Sun et al. 2024). The
    paper has --temperature 2 and --kd-weight 9 with it."""

    def compared(self, logits: Tensor) -> Tensor:
        """The logits (n, c) as the loss takes them: standardized, or as they are."""
        from cka_probe.distill.losses import standardized_logits

        return standardized_logits(logits) if self.standardize_logits else logits


@dataclass(frozen=True, kw_only=True)
class FeatureMethod(Method):
    """A method that compares features. Each states the default of its weight."""

    loss_options: ClassVar[tuple[str, ...]] = ("feature_weight",)

    feature_weight: Annotated[float, Range()] = 1.0
    """Weight of the loss between features."""
