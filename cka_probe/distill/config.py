"""Training: every option of a distillation and its default, in one place; those of a method are the method's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cka_probe.distill.methods import METHODS, Method, method_named
from cka_probe.distill.methods.ofa import OFA
from cka_probe.errors import SpecError
from cka_probe.probing.options import DataSet, Hardware, Options
from cka_probe.runtime.ranges import COUNT, LEAST_EXAMPLES, SEED, Range, shown


@dataclass(frozen=True, kw_only=True)
class Networks(Options):
    """What is trained, and from which teacher."""

    student: str
    """Model spec of the student: resnet18 starts from timm's weights, resnet18@random from scratch. Needed, but for
    --resume and --config."""

    teacher: str | None = None
    """Model spec of the teacher; not needed with --method none."""

    student_layers: str = "stages"
    """Which layers are the student's stages: stages, or paths with commas."""

    teacher_layers: str = "stages"
    """Which layers are the teacher's stages: stages, or paths with commas."""


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataSet):
    """Which images."""

    data: str = "digits"
    """digits (bundled), a folder of class folders (with train and val or test, or a tenth is kept for the test), or a
    data set of timm's: torch/cifar100, hfds/..."""


@dataclass(frozen=True, kw_only=True)
class DividedData(TrainingData):
    """Which images, and which of them decide."""

    validation: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Share of the training images, of each class, that is kept for validation: what is chosen, is chosen on these. 0:
    nothing is chosen. Not used where a folder has train, val and test."""

    probe_examples: Annotated[int, LEAST_EXAMPLES] = 1024
    """Validation images on which student and teacher are compared; training images where there are fewer than 64."""


@dataclass(frozen=True, kw_only=True)
class Optimization(Options):
    """How the weights are updated."""

    train: Literal["all", "head"] = "all"
    """What learns: all, or head, the classifier alone (with --method none). Without random augmentation (--crop-scale
    1 1 --flip 0) the features of each image are then computed once; --recipe head sets all of it."""

    epochs: Annotated[int, COUNT] = 100
    """Passes over the training images."""

    patience: Annotated[int | None, Range(1, 10**6, whole=True, optional=True)] = None
    """Stop after so many epochs without a better validation top-1. The schedule stays that of --epochs."""

    batch_size: Annotated[int, COUNT] = 128
    """Images a step and process."""

    accumulate: Annotated[int, COUNT] = 1
    """Steps whose gradients are averaged into one update."""

    optimizer: str = "adamw"
    """Any of timm's: adamw, sgd (with Nesterov momentum), lamb, ..."""

    lr: Annotated[float, Range(open_low=True)] = 5e-4
    """Learning rate at the end of the warm-up, from where the schedule starts; it is not scaled by the batch."""

    weight_decay: Annotated[float, Range()] = 0.05
    """Of weights; norms, biases and what timm exempts get none."""

    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Where the optimizer has one."""

    schedule: Literal["cosine", "step", "none"] = "cosine"
    """After the warm-up: cosine falls to --min-lr at the end of the run, step divides by ten, none stays."""

    decay_epochs: Annotated[float, Range(open_low=True)] = 30
    """Between two steps of the schedule step, counted from the start of the run."""

    min_lr: Annotated[float, Range()] = 1e-5
    """Where the cosine ends."""

    warmup_epochs: Annotated[float, Range()] = 0
    """Of a learning rate that grows linearly from --warmup-lr to --lr; they are part of --epochs."""

    warmup_lr: Annotated[float, Range()] = 5e-7
    """Where the warm-up starts."""

    clip: Annotated[float | None, Range(open_low=True, optional=True)] = None
    """Largest norm of the gradient."""

    ema: Annotated[float | None, Range(0, 1, open_low=True, open_high=True, optional=True)] = None
    """Decay of an average of the student's weights, such as 0.9998; it grows to that, as in timm. Of the average and
    the last weights, the better one on the validation images is exported; without these, the average."""

    smoothing: Annotated[float, Range(0, 1)] = 0.1
    """Of labels."""


@dataclass(frozen=True, kw_only=True)
class Augmentation(Options):
    """What is done to the training images."""

    crop_scale: Annotated[tuple[float, float], Range(0, 1, open_low=True, many=True)] = (0.08, 1.0)
    """Share of the image that a random crop keeps: the least and the most."""

    crop_ratio: Annotated[tuple[float, float], Range(0, 1000, open_low=True, many=True)] = (0.75, 1.3333)
    """Width over height of a random crop: the least and the most."""

    flip: Annotated[float, Range(0, 1)] = 0.5
    """Probability of a horizontal flip."""

    color_jitter: Annotated[float, Range(0, 100)] = 0.0
    """Of brightness, contrast and saturation; not together with --rand-augment."""

    rand_augment: str | None = None
    """As timm writes it: rand-m9-mstd0.5-inc1."""

    mixup: Annotated[float, Range(0, 10**6)] = 0.0
    """Its alpha."""

    cutmix: Annotated[float, Range(0, 10**6)] = 0.0
    """Its alpha."""

    erasing: Annotated[float, Range(0, 1)] = 0.0
    """Probability of a random rectangle of noise."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Hardware):
    """Where it runs, and in which type of numbers."""

    bf16: bool = False
    """Run the networks in bfloat16 by autocast."""

    fp16: bool = False
    """Run the networks in float16 by autocast, with scaled gradients in training: for CUDA GPUs without bfloat16, such
    as T4 and V100. Not together with --bf16."""

    def check(self) -> None:
        """As `Options.check`; there is one type at most."""
        super().check()
        if self.bf16 and self.fp16:
            raise SpecError(
                "--bf16 and --fp16 exclude each other. Choose one; where a recipe or --config sets the other, switch "
                "that off, with --no-bf16 say."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRun(MixedPrecision):
    """Where and how it runs."""

    channels_last: bool = False
    """Memory format of images and networks."""

    compile: bool = False
    """Compile student and teacher with torch.compile."""

    image_cache: Annotated[float, Range(0, 10**6, open_low=True)] = 4.0
    """Gibibytes of decoded images that may be held in memory; data sets that fit are."""

    checkpoint_minutes: Annotated[float, Range(0, 10**6)] = 10.0
    """Between two checkpoints within an epoch; there is one at the end of each."""

    tensorboard: bool = False
    """Write event files for TensorBoard too (needs the package tensorboard)."""

    seed: Annotated[int, SEED] = 0
    """Of the order, the augmentation, the branches and dropout; random weights of a model have their own."""


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


@dataclass(frozen=True, kw_only=True)
class Evaluation(MixedPrecision, TrainingData):
    """On which images, and how."""

    by: Literal["logits", "knn", "linear", "fewshot"] = "logits"
    """logits: by the network's own classifier. The others use the features that it gets: knn, the --neighbours nearest
    training images; linear, logistic regression on the training images; fewshot, episodes of classes with --shots
    images each, of the evaluated images alone."""

    neighbours: Annotated[int, COUNT] = 20
    """Training images that vote, with --by knn."""

    shots: Annotated[int, COUNT] = 5
    """Images a class that make its prototype, with --by fewshot."""

    ways: Annotated[int, Range(2, 10**6, whole=True)] = 50
    """Classes of an episode, with --by fewshot; all, where there are fewer."""

    episodes: Annotated[int, Range(2, 10**6, whole=True)] = 200
    """Episodes of one query a class, with --by fewshot."""

    seed: Annotated[int, SEED] = 0
    """Of the episodes."""

    data: str = "digits"
    """digits (bundled), a folder of class folders, or a data set of timm's: torch/cifar100, hfds/... Of a folder with
    test/ or val/ that part, else all images; but of a run's own data, for its student, the test images of the run."""

    batch_size: Annotated[int, COUNT] = 128
    """Images a forward pass."""


ELSEWHERE = ("device", "workers", "image_cache", "checkpoint_minutes", "data_dir", "download", "tensorboard")
"""Options that say where and not what: a run may be resumed with others."""
