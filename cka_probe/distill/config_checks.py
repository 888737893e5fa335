"""The options of a distillation, checked before anything is loaded: each alone, and together."""

from __future__ import annotations

import re
from collections.abc import Collection

from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS
from cka_probe.distill.training.learner import try_optimizer
from cka_probe.distill.training.pipeline import augmentation
from cka_probe.errors import SpecError
from cka_probe.probing.option_checks import check_models
from cka_probe.runtime.randomness import keeping_random_state
from cka_probe.runtime.ranges import flag, shown

_RAND_AUGMENT = re.compile(
    r"rand(-(m|n|mmax)[0-9]{1,3}|-(p|mstd)[0-9]{1,3}(\.[0-9]{1,9})?|-inc[01]|-t(weights|3a|3aw))*"
)
"""What timm's parser knows; it passes over some of what it does not."""


def check_training(config: Training, loaded: Collection[str] = ()) -> None:
    """Check the options of a distillation. No network and no image is loaded.

    The device is checked by `cka_probe.runtime.devices.device_named`.

    Args:
        config: all options.
        loaded: which of student and teacher are there already, so that their names are no model specs.

    Raises:
        SpecError: an option is out of range, two do not go together, or a file is missing.
    """
    config.check()
    _check_together(config)
    _check_without_labels(config)
    for spec in specs_of(config, loaded):
        check_models([spec])
    _check_timms(config)


def specs_of(config: Training, loaded: Collection[str] = ()) -> list[str]:
    """The model specs of student, teacher and what else the method names; see `check_training`."""
    named = {"student": config.student, "teacher": config.teacher}
    own = [spec for role, spec in named.items() if spec is not None and role not in loaded]
    return [*own, *config.method.models]


def _check_together(config: Training) -> None:
    for name in ("crop_scale", "crop_ratio"):
        values = getattr(config, name)
        if len(values) != 2 or values[0] > values[1]:
            raise SpecError(f"{flag(name)} must be two numbers, the smaller one first, but is {shown(values)}.")
    if config.warmup_epochs > config.epochs:
        raise SpecError(
            f"--warmup-epochs must be at most --epochs, {config.epochs}, but is {config.warmup_epochs:g}. Shorten the "
            "warm-up, or train longer."
        )
    if config.train == "head" and not config.method.trains_heads:
        suited = " or ".join(name for name, method in METHODS.items() if method.trains_heads)
        raise SpecError(
            f"--train head trains the classifier alone, by labels: use --method {suited} with it, not "
            f"{config.method.name}."
        )
    if config.teacher_cache is not None and not config.method.needs_teacher:
        raise SpecError(f"--teacher-cache needs a teacher, but --method {config.method.name} has none.")
    if config.teacher_cache_dtype != "same" and config.teacher_cache is None:
        raise SpecError("--teacher-cache-dtype is for --teacher-cache DIR. Add it, or leave both out.")
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        raise SpecError(f"Mixup and cutmix need an even --batch-size, but it is {config.batch_size}.")
    if config.patience is not None and not config.validation:
        raise SpecError("--patience needs validation images, but --validation is 0. Give --validation 0.1, say.")


def _check_without_labels(config: Training) -> None:
    """Raise a SpecError where an option needs labels that the method does not use."""
    if config.method.uses_labels:
        return
    for name in ("mixup", "cutmix", "patience", "ema"):
        if getattr(config, name):
            raise SpecError(
                f"{flag(name)} needs labels, but --method {config.method.name} learns from none here. Leave it out."
            )


def _check_timms(config: Training) -> None:
    """Raise a SpecError where timm cannot make the optimizer or read ``--rand-augment``: both are tried."""
    from PIL import Image

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
