"""Models as a caller gives them -> subjects, each with a name of its own and the preprocessing that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from cka_probe.errors import SpecError
from cka_probe.models import Subject, load_subject, preprocessing_of

logger = logging.getLogger(__name__)

Model = str | nn.Module | Subject


def named_subjects(models: Sequence[Model] | Mapping[str, Model]) -> list[Subject]:
    if isinstance(models, (str, nn.Module, Subject)):
        models = [models]
    named = models.items() if isinstance(models, Mapping) else ((None, model) for model in models)
    subjects = [_subject(model, name) for name, model in named]
    if not subjects:
        raise SpecError("A comparison needs at least one model, but got none.")
    names = [subject.name for subject in subjects]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise SpecError(
            f"Each model must have a name of its own, but {double[0]!r} stands {names.count(double[0])} times. "
            "Write name=SPEC on the command line, or give a mapping from name to model in Python."
        )
    return subjects


def _subject(model: Model, name: str | None) -> Subject:
    if isinstance(model, str):
        logger.info("Loading %s", model)
        model = load_subject(model)
    elif isinstance(model, nn.Module):
        model = Subject(type(model).__name__, model, preprocessing_of(model))
    elif not isinstance(model, Subject):
        raise SpecError(f"A model must be a spec, a torch.nn.Module or a Subject, but got {type(model).__name__}.")
    return replace(model, name=name) if name else model


def preprocessed(
    subject: Subject, image_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Subject:
    own = subject.preprocessing
    channels = own.size[0]
    if image_size is not None and image_size < 1:
        raise SpecError(f"The image size must be at least 1 pixel, but is {image_size}.")
    if std is not None and not all(value > 0 for value in std):
        raise SpecError(f"std must be above 0 in every channel, but is {list(std)}.")
    for what, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise SpecError(f"{what} must hold a number for each of the {channels} channels, but got {list(given)}.")
    changed = replace(
        own,
        size=(channels, image_size, image_size) if image_size is not None else own.size,
        mean=tuple(map(float, mean)) if mean is not None else own.mean,
        std=tuple(map(float, std)) if std is not None else own.std,
    )
    return replace(subject, preprocessing=changed)
