"""Training: every option of a distillation and its default, in one place; those of a method are the method's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cka_probe.distill.methods import METHODS, Method, method_named
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.options import MixedPrecision, TrainingData
from cka_probe.errors import SpecError
from cka_probe.probing.options import Options
from cka_probe.runtime.ranges import COUNT, LEAST_EXAMPLES, SEED, Range, shown


@dataclass(frozen=True, kw_only=True)
class Networks(Options):
    """What is trained, and from which teacher."""

    student: str
    """Model spec of the student: resnet18 starts from timm's weights, resnet18@random from scratch. Required unless
    --resume or --config gives it."""

    teacher: str | None = None
    """Model spec of the teacher; not needed with --method none."""

    student_layers: str = "stages"
    """Layers that are the student's stages: stages, or module paths separated by commas."""

    teacher_layers: str = "stages"
    """Layers that are the teacher's stages: stages, or module paths separated by commas."""


@dataclass(frozen=True, kw_only=True)
class DividedData(TrainingData):
    """Which images, and which of them decide."""

    validation: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Fraction of the training images of each class that is held out for validation, which chooses stages and the best
    epoch. 0: nothing is chosen. Ignored if a folder has train, val and test."""

    probe_examples: Annotated[int, LEAST_EXAMPLES] = 1024
    """Validation images on which student and teacher are compared; training images if there are fewer than 64."""


@dataclass(frozen=True, kw_only=True)
class Optimization(Options):
    """How the weights are updated."""

    train: Literal["all", "head"] = "all"
    """Train all weights, or the head (classifier) alone, with --method none. Without random augmentation (--crop-scale
    1 1 --flip 0), the features of each image are then computed once; --recipe head sets this up."""

    epochs: Annotated[int, COUNT] = 100
    """Passes over the training images."""

    patience: Annotated[int | None, Range(1, 10**6, whole=True, optional=True)] = None
    """Stop after this many epochs without a better validation top-1. The schedule still spans --epochs."""

    batch_size: Annotated[int, COUNT] = 128
    """Images per step and process."""

    accumulate: Annotated[int, COUNT] = 1
    """Gradient accumulation: steps per update."""

    optimizer: str = "adamw"
    """Name of a timm optimizer: adamw, sgd (with Nesterov momentum), lamb, ..."""

    lr: Annotated[float, Range(open_low=True)] = 5e-4
    """Learning rate after the warm-up. It is not scaled by the batch size."""

    weight_decay: Annotated[float, Range()] = 0.05
    """Weight decay; not applied to norms, biases and what timm exempts."""

    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Momentum, if the optimizer has one."""

    schedule: Literal["cosine", "step", "none"] = "cosine"
    """Learning rate schedule after the warm-up: cosine down to --min-lr, step (divides by ten), or none (constant)."""

    decay_epochs: Annotated[float, Range(open_low=True)] = 30
    """Epochs between two steps of --schedule step, counted from the start of the run."""

    min_lr: Annotated[float, Range()] = 1e-5
    """Final learning rate of --schedule cosine."""

    warmup_epochs: Annotated[float, Range()] = 0
    """Epochs of linear warm-up from --warmup-lr to --lr, included in --epochs."""

    warmup_lr: Annotated[float, Range()] = 5e-7
    """Initial learning rate of the warm-up."""

    clip: Annotated[float | None, Range(open_low=True, optional=True)] = None
    """Maximum norm of the gradient. Default: no clipping."""

    ema: Annotated[float | None, Range(0, 1, open_low=True, open_high=True, optional=True)] = None
    """Decay of an exponential moving average (EMA) of the student's weights, such as 0.9998, with timm's warm-up of the
    decay. The average or the last weights are exported, whichever is better on the validation images."""

    smoothing: Annotated[float, Range(0, 1)] = 0.1
    """Label smoothing."""


@dataclass(frozen=True, kw_only=True)
class Augmentation(Options):
    """What is done to the training images."""

    crop_scale: Annotated[tuple[float, float], Range(0, 1, open_low=True, many=True)] = (0.08, 1.0)
    """Minimum and maximum fraction of the image's area in a random crop."""

    crop_ratio: Annotated[tuple[float, float], Range(0, 1000, open_low=True, many=True)] = (0.75, 1.3333)
    """Minimum and maximum aspect ratio (width / height) of a random crop."""

    flip: Annotated[float, Range(0, 1)] = 0.5
    """Probability of a horizontal flip."""

    color_jitter: Annotated[float, Range(0, 100)] = 0.0
    """Color jitter of brightness, contrast and saturation; excludes --rand-augment."""

    rand_augment: str | None = None
    """RandAugment policy in timm's notation, such as rand-m9-mstd0.5-inc1."""

    mixup: Annotated[float, Range(0, 10**6)] = 0.0
    """Alpha of mixup's Beta distribution; 0: no mixup."""

    cutmix: Annotated[float, Range(0, 10**6)] = 0.0
    """Alpha of CutMix's Beta distribution; 0: no CutMix."""

    erasing: Annotated[float, Range(0, 1)] = 0.0
    """Probability of random erasing (a rectangle of noise)."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun(MixedPrecision):
    """Where and how it runs."""

    channels_last: bool = False
    """Use the channels-last memory format."""

    compile: bool = False
    """Compile student and teacher with torch.compile."""

    image_cache: Annotated[float, Range(0, 10**6, open_low=True)] = 4.0
    """GiB of memory for decoded images. A data set that fits is kept in memory."""

    checkpoint_minutes: Annotated[float, Range(0, 10**6)] = 10.0
    """Minutes between checkpoints within an epoch. Each epoch ends with one."""

    teacher_cache: str | None = None
    """Folder that keeps the teacher's outputs of each step, for methods that need its logits or pooled features alone:
    a run whose teacher, data, augmentation, seed and batches are the same takes them from there."""

    teacher_cache_dtype: Literal["same", "float16"] = "same"
    """Of what is kept: as it is computed, so that a run with the cache equals one without, or in half the space."""

    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""

    seed: Annotated[int, SEED] = 0
    """Seed of image order, augmentation, branches and dropout. Random weights of a model have their own
    (SPEC@random:7)."""


GROUPS: dict[str, type[Options]] = {
    "networks": Networks,
    "images": DividedData,
    "optimization": Optimization,
    "augmentation": Augmentation,
    "running": TrainingRun,
}
"""The groups of `Training` that all methods share, by what the command line calls them."""


@dataclass(frozen=True, kw_only=True)
class Training(TrainingRun, Augmentation, Optimization, DividedData, Networks):
    """All options of a distillation: what is trained, from which teacher, on which images, and how."""

    method: Method = OFA()
    """How the student is taught. A name stands for the method with its defaults."""

    def __post_init__(self) -> None:
        """As `Options`; the name of a method becomes the method."""
        super().__post_init__()
        if isinstance(self.method, str):
            object.__setattr__(self, "method", method_named(self.method)())

    def check(self) -> None:
        """As `DividedData.check`; the method's options are checked too, alone and with the others."""
        super().check()
        if not isinstance(self.method, Method):
            raise SpecError(f"--method must be the name of a method, or a method, but is {shown(self.method)}.")
        self.method.check()
        self.method.check_with(self)


COMMON = frozenset(field.name for field in fields(Training))
"""The names of the options that all methods share, ``method`` among them."""

_RENAMED = {"memory": "image_cache"}
"""Options of earlier records -> their names now."""


def method_options(method: type[Method]) -> dict[str, Any]:
    """The options of a method by their names, with their defaults."""
    return {field.name: field.default for field in fields(method)}


def methods_with(option: str) -> list[str]:
    """The names of the methods that have an option of their own."""
    return [name for name, method in METHODS.items() if option in method_options(method)]


def as_record(config: Training) -> dict[str, Any]:
    """All options in one mapping of plain values, the method's among them: as run.yaml and checkpoints hold them."""
    common = {name: value for name, value in vars(config).items() if name != "method"}
    options = {**common, "method": config.method.name, **vars(config.method)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def from_record(options: Mapping[str, Any]) -> Training:
    """The options that `as_record` gave, or an earlier version wrote.

    Options that the method does not have, or nobody, are passed over.

    Raises:
        SpecError: there is no such method.
    """
    options = renewed(options)
    method = method_named(options.get("method", Training.method.name))
    common = {name: value for name, value in options.items() if name in COMMON and name != "method"}
    own = {name: value for name, value in options.items() if name in method_options(method)}
    return Training(**common, method=method(**own))


def renewed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record as they are named now; without those that stood for a method's own default."""
    return {
        _RENAMED.get(name, name): value
        for name, value in options.items()
        if not (name == "feature_weight" and value is None)
    }


ELSEWHERE = (
    "device", "workers", "image_cache", "teacher_cache", "checkpoint_minutes", "data_dir", "download", "tensorboard",
)  # fmt: skip
"""Options that say where and not what: a run may be resumed with others."""
