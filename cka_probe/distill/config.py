"""Training: every option of a distillation and its default, in one place; recipes and records that preset them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from importlib import resources
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cka_probe.cli.removed_options import RENAMED_OF_DISTILL
from cka_probe.errors import SpecError
from cka_probe.probing.option_checks import check_models
from cka_probe.probing.options import DataSet, Hardware, Options
from cka_probe.runtime.paths import usable_path
from cka_probe.runtime.ranges import COUNT, LEAST_EXAMPLES, SEED, Range, flag, shown


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


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """How the student is taught, and the parts of the loss."""

    method: str = "ofa"
    """none (from scratch), kd, ofa, fitnet, cc, rkd, crd, dkd, dist. The command cka-probe methods says what each
    does."""

    temperature: Annotated[float, Range(0, 10**6, open_low=True)] = 1.0
    """Of teacher and student probabilities."""

    ce_weight: Annotated[float, Range()] = 1.0
    """Of the cross-entropy with the labels."""

    kd_weight: Annotated[float, Range()] = 1.0
    """Of the loss between the final logits (kd, ofa, dkd, dist)."""

    feature_weight: Annotated[float | None, Range(optional=True)] = None
    """Of the loss between features: by default 1 (fitnet), 0.02 (cc), 25 and twice that for angles (rkd), 0.8 (crd;
    in runs of a few epochs, less is better)."""

    gamma: Annotated[tuple[float, ...], Range(1, many=True)] = (1.0,)
    """Target enhancement of ofa: one number, or one a stage and one for the final logits."""

    enhancement: Literal["code", "paper"] = "code"
    """code: all classes are raised to gamma, as in the authors' program. paper: the target class alone."""

    branch_weight: Annotated[float, Range()] = 1.0
    """Of one branch, where all stages have one; fewer branches share the same sum."""

    branch_weights: Annotated[tuple[float, ...], Range(many=True, optional=True)] = ()
    """Relative weight of each stage's branch; equal where empty."""


@dataclass(frozen=True, kw_only=True)
class StageChoice(Options):
    """Which stages of the student take part, and how they are chosen."""

    stages: str = "all"
    """Student stages that get an exit branch (ofa) or a matched layer (fitnet): all, last, 1,3,4, or auto."""

    rule: Literal["budget", "divergent", "aligned"] = "budget"
    """How auto chooses: the most divergence within --branch-budget, or the --branches least or most similar."""

    branches: Annotated[int, COUNT] = 2
    """Stages that the rules divergent and aligned choose."""

    branch_budget: Annotated[float, Range(0, 1, open_low=True)] = 0.6
    """Share of the parameters of all branches that the rule budget may spend."""

    probe_epochs: Annotated[int, Range(0, 10**6, whole=True)] = 1
    """Epochs before auto measures and the branches join."""

    probe_examples: Annotated[int, LEAST_EXAMPLES] = 1024
    """Validation images on which student and teacher are compared; training images where there are fewer than 64."""

    similarity: str | None = None
    """A finished comparison (its folder or npz file) that auto decides from, at once."""


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
class TrainingRun(Hardware):
    """Where and how it runs."""

    bf16: bool = False
    """Forward passes in bfloat16 by autocast."""

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
    "method": MethodOptions,
    "stages": StageChoice,
    "optimization": Optimization,
    "augmentation": Augmentation,
    "running": TrainingRun,
}
"""The groups of `Training`, by what the command line calls them."""


@dataclass(frozen=True, kw_only=True)
class Training(TrainingRun, Augmentation, Optimization, StageChoice, MethodOptions, DividedData, Networks):
    """All options of a distillation: what is trained, from which teacher, on which images, and how."""

    def check(self) -> None:
        """Raise a SpecError where an option is out of range, two do not go together, or a file is missing.

        Nothing is loaded. The device is checked by `cka_probe.runtime.devices.device_named`.
        """
        super().check()
        _check_together(self)
        if self.similarity is not None and not os.path.exists(usable_path(self.similarity, "--similarity")):
            raise SpecError(f"The comparison {shown(self.similarity)} does not exist (--similarity).")
        check_models([spec for spec in (self.student, self.teacher) if spec is not None])
        _check_timms(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Hardware, TrainingData):
    """On which images, and how."""

    data: str = "digits"
    """digits (bundled), a folder of class folders, or a data set of timm's: torch/cifar100, hfds/... Of a folder with
    test/ or val/ that part, else all images; but of a run's own data, for its student, the test images of the run."""

    batch_size: Annotated[int, COUNT] = 128
    """Images a forward pass."""

    bf16: bool = False
    """Run the network in bfloat16 by autocast."""


ELSEWHERE = ("device", "workers", "image_cache", "checkpoint_minutes", "data_dir", "download", "tensorboard")
"""Options that say where and not what: a run may be resumed with others."""

_RAND_AUGMENT = re.compile(
    r"rand(-(m|n|mmax)[0-9]{1,3}|-(p|mstd)[0-9]{1,3}(\.[0-9]{1,9})?|-inc[01]|-t(weights|3a|3aw))*"
)
"""What timm's parser knows; it passes over some of what it does not."""

C = TypeVar("C", bound=Training)


def _check_together(config: Training) -> None:
    from cka_probe.distill.methods import METHODS

    if config.method not in METHODS:
        close = get_close_matches(config.method.lower(), METHODS, n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise SpecError(f"--method must be one of {', '.join(METHODS)}, but is {shown(config.method)}.{hint}")
    for name in ("crop_scale", "crop_ratio"):
        values = getattr(config, name)
        if len(values) != 2 or values[0] > values[1]:
            raise SpecError(f"{flag(name)} must be two numbers, the smaller one first, but is {shown(values)}.")
    if config.branch_weights and not 0 < sum(config.branch_weights) < inf:
        raise SpecError(
            f"--branch-weights must hold a number above 0, and have a finite sum, but is "
            f"{shown(config.branch_weights)}."
        )
    if config.warmup_epochs > config.epochs:
        raise SpecError(
            f"--warmup-epochs must be at most --epochs, {config.epochs}, but is {config.warmup_epochs:g}. Shorten the "
            "warm-up, or train longer."
        )
    if METHODS[config.method].needs_teacher and not config.teacher:
        raise SpecError(f"--method {config.method} needs a teacher: --teacher SPEC. Without one, use --method none.")
    if config.train == "head" and config.method != "none":
        raise SpecError(
            f"--train head trains the classifier alone, by labels: use --method none with it, not {config.method}."
        )
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise SpecError(f"Mixup and cutmix need an even --batch-size, but it is {config.batch_size}.")
    if config.stages == "auto" and not config.similarity and config.probe_epochs >= config.epochs:
        raise SpecError(
            f"--stages auto needs epochs after its --probe-epochs, but {config.probe_epochs} of {config.epochs} are."
        )
    if config.patience is not None and not config.validation:
        raise SpecError("--patience needs validation images, but --validation is 0. Give --validation 0.1, say.")
    if config.similarity is not None and config.stages != "auto":
        raise SpecError(f"--similarity is for --stages auto, but the stages are {shown(config.stages)}.")
    if not re.fullmatch(r"all|last|auto|[0-9]{1,4}( *, *[0-9]{1,4})*", config.stages):
        raise SpecError(f"--stages must be all, last, auto, or numbers such as 1,3,4, but is {shown(config.stages)}.")


def _check_timms(config: Training) -> None:
    """Raise a SpecError where timm cannot make the optimizer or read ``--rand-augment``: both are tried."""
    from PIL import Image

    from cka_probe.distill.training.learner import try_optimizer
    from cka_probe.distill.training.pipeline import augmentation
    from cka_probe.runtime.randomness import keeping_random_state

    with keeping_random_state():
        try_optimizer(config)
    if config.rand_augment is None:
        return
    wrong = f"--rand-augment must be written as timm does, rand-m9-mstd0.5, but is {shown(config.rand_augment)}"
    if not _RAND_AUGMENT.fullmatch(config.rand_augment):
        raise SpecError(f"{wrong}.")
    try:
        with keeping_random_state():
            augmentation(config, (3, 32, 32))(Image.new("RGB", (32, 32)))
    except (ValueError, LookupError) as error:
        raise SpecError(f"{wrong}: {error}.") from error


def recipe(name: str) -> dict[str, Any]:
    """The values that a recipe of the package presets.

    Raises:
        SpecError: there is no such recipe.

    >>> recipe("cifar-token")["mixup"]
    0.8
    """
    import yaml

    folder = resources.files("cka_probe.distill") / "recipes"
    known = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    if name not in known:
        raise SpecError(f"--recipe must be one of {', '.join(known)}, but got {name!r}.")
    return dict(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


def recorded(path: str | Path) -> dict[str, Any]:
    """The options that a run.yaml of distill holds.

    Raises:
        SpecError: it is no such file.
    """
    import yaml

    path = usable_path(path, "--config")
    if not os.path.exists(path):
        raise SpecError(f"The file {path} does not exist (--config).")
    path = path / "run.yaml" if path.is_dir() else path
    try:
        if not path.is_file():
            raise OSError("it is no regular file" if path.exists() else "it does not exist")
        options = yaml.safe_load(path.read_text(encoding="utf-8"))["options"]
        # A run of version 0.1 knew no validation images: it was trained on all images.
        return {"validation": 0, **{str(name): value for name, value in dict(options).items()}}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"--config must be the run.yaml of a distillation, but {path} is not: {reason}") from error


def renewed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record, those that were renamed since under the names that they have now."""
    return {RENAMED_OF_DISTILL.get(name, name): value for name, value in options.items()}


def with_options(config: C, options: Mapping[str, Any]) -> C:
    """The config with some values replaced, lists as the tuples that they were.

    Raises:
        SpecError: an option is not known.
    """
    options = renewed(options)
    known = {field.name for field in fields(Training)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise SpecError(f"There are no such options: {', '.join(unknown)}. See cka-probe distill --help.")
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return replace(config, **plain)
