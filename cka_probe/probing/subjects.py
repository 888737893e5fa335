"""Models as a caller gives them -> subjects, each with a name of its own and the preprocessing that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cka_probe.errors import DataError, SpecError
from cka_probe.images.broken import Search
from cka_probe.images.dark import warn_if_dark
from cka_probe.images.preprocessing import preprocessing_of
from cka_probe.images.samples import Samples, holds_tensors, sample, without_broken
from cka_probe.images.sources.pairs import pair_names, paired_folder
from cka_probe.images.sources.source import ImageSource, open_source
from cka_probe.images.views import IDENTITY, View, parse_views
from cka_probe.networks.models import Subject, load_subject
from cka_probe.probing.in_turn.weight_offload import WeightOffload
from cka_probe.probing.options import Images
from cka_probe.probing.stored_features import (
    StoredFeatures,
    as_stored,
    check_same_samples,
    is_stored,
    read_stored,
    stored_examples,
)
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

Model = str | Path | nn.Module | Subject | StoredFeatures | NDArray[Any] | Tensor
Models = Sequence[Model] | Mapping[str, Model]


def named_subjects(models: Models, offload: WeightOffload | None = None) -> list[Subject | StoredFeatures]:
    """The subjects that a caller names: networks, and features that are stored.

    Args:
        models: as for `cka_probe.compare`.
        offload: keeps the weights of networks that are loaded here.
    """
    if isinstance(models, (str, Path, nn.Module, Subject, StoredFeatures)):
        models = [models]
    named = models.items() if isinstance(models, Mapping) else ((None, model) for model in models)
    subjects = [subject for name, model in named for subject in _subjects(model, name, offload)]
    if not subjects:
        raise SpecError("Give at least one model, such as resnet18 or zoo:cnn.")
    names = [subject.name for subject in subjects]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise SpecError(
            f"Each model must have a name of its own, but {double[0]!r} stands {names.count(double[0])} times. "
            "Write name=SPEC on the command line, or give a mapping from name to model in Python."
        )
    return subjects


def _subjects(model: Model, name: str | None, offload: WeightOffload | None) -> Sequence[Subject | StoredFeatures]:
    if isinstance(model, (str, Path)):
        spec = f"{name}={model}" if name and is_stored(str(model)) else str(model)
        if is_stored(spec):
            return read_stored(spec)
        logger.info("Loading %s", spec)
        model = load_subject(spec)
        if offload is not None:
            offload.offload(model.network)
    elif isinstance(model, nn.Module):
        model = Subject(type(model).__name__, model, preprocessing_of(model))
    elif isinstance(model, (np.ndarray, Tensor)):
        model = as_stored(model, name or "array")
    elif not isinstance(model, (Subject, StoredFeatures)):
        raise SpecError(
            "A model must be a spec, a torch.nn.Module, a Subject or an (n, d) array of features, but got "
            f"{type(model).__name__}."
            + (" Give the network that it was exported from." if type(model).__name__ == "ExportedProgram" else "")
        )
    return [replace(model, name=name) if name else model]


def examples_and_subjects(
    models: Models,
    images: Images,
    world: World | None = None,
    offload: WeightOffload | None = None,
    workers: int | None = None,
) -> tuple[Samples, list[Subject | StoredFeatures]]:
    """The examples and the subjects of a comparison: models with their preprocessing, through views, or on pairs.

    Args:
        models: as for `cka_probe.compare`.
        images: which, and how the networks see them.
        world: the processes that must all see the same images.
        offload: keeps the weights of networks that are loaded here.
        workers: processes that decode images while broken ones are searched.

    Raises:
        CkaProbeError: they cannot be loaded, or do not go together.
    """
    paired, seen = images.paired, parse_views(images.views)
    plain = seen == (IDENTITY,)
    if paired is not None and not plain:
        raise SpecError("Use either --view or --paired: each of them runs a model on several inputs.")
    found = named_subjects(models, offload)
    networks = [preprocessed(s, images) for s in found if isinstance(s, Subject)]
    stored = [s for s in found if isinstance(s, StoredFeatures)]
    held = stored_examples(stored) if stored else None
    if held is not None and not networks:
        if paired is not None or not plain:
            raise SpecError("Views and paired folders need images, but all models are stored features.")
        return sample(held, images.examples, images.seed), list(stored)
    with world.first_ahead() if world is not None and images.download else nullcontext():
        source = open_source(
            images.data, split=images.split, data_dir=images.data_dir, download=images.download,
            full_scale=images.full_scale,
        )  # fmt: skip
    samples = sample(source, images.examples, images.seed)
    if world is not None and world.from_first(samples.sha256) != samples.sha256:
        raise DataError(f"All processes must see the same images, but {source.name} is not the same for rank 0.")
    if paired is not None:
        samples = replace(samples, paired=paired_folder(source, paired, split=images.split))
    asked = samples
    if images.skip_broken:
        samples = without_broken(samples, Search(world or World(torch.device("cpu")), workers))
    if not isinstance(images.data, ImageSource):  # that one was open already
        warn_if_dark(source, samples.indices)
    if samples.paired is not None:
        warn_if_dark(samples.paired, samples.indices)
    aligned = {subject.name: _aligned(subject, asked, samples) for subject in stored}
    if holds_tensors(samples) and not (plain and (images.image_size, images.mean, images.std) == (None, None, None)):
        raise SpecError(
            "Views, image_size, mean and std are for images, but the data are tensors: they are used as they are."
        )
    versions = {network.name: seen_through(network, seen) for network in networks}
    if paired is not None:
        names = pair_names(str(images.data), paired)
        versions = {network.name: seen_on_both_sides(network, names) for network in networks}
    made: dict[str, Sequence[Subject | StoredFeatures]] = {**versions, **aligned}
    return samples, [s for subject in found for s in made[subject.name]]


def _aligned(subject: StoredFeatures, asked: Samples, used: Samples) -> list[StoredFeatures]:
    """Stored features of the used samples; of all that were asked for, the rows of images that cannot be read go."""
    every = [asked.source.identity(int(index)) for index in asked.indices]
    if used.broken and subject.samples is not None and subject.samples[: len(every)] == tuple(every):
        return [subject.of_rows(np.flatnonzero(np.isin(asked.indices, used.indices)))]
    check_same_samples(subject, [used.source.identity(int(index)) for index in used.indices])
    return [subject]


def seen_through(subject: Subject, views: Sequence[View]) -> list[Subject]:
    """A subject once a view, its name with the view's in brackets; as it is where the identity is the only one.

    A name may hold an ``@`` before a checkpoint, but no brackets, so that the two cannot be confused.
    """
    if list(views) == [IDENTITY]:
        return [subject]
    return [replace(_version(subject, view.name), view=view) for view in views]


def seen_on_both_sides(subject: Subject, names: tuple[str, str]) -> list[Subject]:
    """A subject twice: on the first and on the second images of the pairs, with the name of these in brackets."""
    sides: tuple[Literal[0], Literal[1]] = (0, 1)
    return [replace(_version(subject, names[side]), side=side) for side in sides]


def _version(subject: Subject, name: str) -> Subject:
    """One of several subjects of a model; its record names the model, by which they find each other again."""
    return replace(subject, name=f"{subject.name} [{name}]", source={**subject.source, "model": subject.name})


def preprocessed(subject: Subject, images: Images) -> Subject:
    """The subject with the size, mean and deviation that were asked for in place of its own; a view_size stays.

    Raises:
        SpecError: the network has another number of channels.
    """
    own, image_size, mean, std = subject.preprocessing, images.image_size, images.mean, images.std
    channels, sized = own.size[0], "view_size" in subject.source
    for what, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise SpecError(f"{what} must hold a number for each of the {channels} channels, but got {list(given)}.")
    changed = replace(
        own,
        size=(channels, image_size, image_size) if image_size is not None and not sized else own.size,
        mean=tuple(map(float, mean)) if mean is not None else own.mean,
        std=tuple(map(float, std)) if std is not None else own.std,
    )
    return replace(subject, preprocessing=changed)
