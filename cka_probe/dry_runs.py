"""The dry runs before the loop: which images each subject sees, what its network does, and which layers are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cka_probe.advice import advice, wrong_size
from cka_probe.data import Samples, Transform, batches, holds_tensors
from cka_probe.errors import NetworkError, SpecError
from cka_probe.features import Pool
from cka_probe.layers import choose_layers
from cka_probe.memory import explaining_out_of_memory
from cka_probe.models import Subject, as_pixels
from cka_probe.probing import Probe, Receiver, StoredProbe, probes_of
from cka_probe.similarity import Layer
from cka_probe.stored_features import StoredFeatures
from cka_probe.trace import DRY_RUN_IMAGES, Trace, TracedLayer, trace

_PREVIEWED = 8

Preview = Callable[[Mapping[str, NDArray[np.uint8]]], None]


@dataclass(frozen=True)
class Looks:
    """The kinds of images that some subjects see: those with the same look share them.

    Attributes:
        transforms: of each kind, from an image to a network's input.
        sides: of each kind, which image of a pair it is.
        seen_as: subject -> the number of its kind.
    """

    transforms: Sequence[Transform]
    sides: Sequence[int]
    seen_as: Mapping[str, int]


def looks_of(subjects: Sequence[Subject | StoredFeatures]) -> Looks:
    """The kinds of images that these subjects see; none for stored features."""
    networks = [subject for subject in subjects if isinstance(subject, Subject)]
    looks = list(dict.fromkeys(subject.look for subject in networks))
    return Looks(
        [preprocessing.transform(view) for preprocessing, view, _ in looks],
        [side for _, _, side in looks],
        {subject.name: looks.index(subject.look) for subject in networks},
    )


@dataclass(frozen=True)
class DryRuns:
    """What the dry runs of all subjects found.

    Attributes:
        labels: of all layers, subject by subject.
        traces: network -> what it did.
        traced: network -> the layers chosen.
        picked: stored features -> the layers chosen.
        tensors: whether the data are tensors, and not images.
    """

    labels: tuple[Layer, ...]
    traces: Mapping[str, Trace]
    traced: Mapping[str, Sequence[TracedLayer]]
    picked: Mapping[str, Sequence[str]]
    tensors: bool

    def probes(
        self,
        subjects: Sequence[Subject | StoredFeatures],
        measures: Sequence[Receiver],
        pool: Pool | None,
        amp: bool,
        where: torch.device,
        seed: int,
    ) -> list[Probe | StoredProbe]:
        """A probe of each subject, in their order."""
        return probes_of(subjects, self.traces, self.traced, self.picked, measures, pool, amp, where, seed)


def dry_runs(
    subjects: Sequence[Subject | StoredFeatures],
    samples: Samples,
    looks: Looks,
    *,
    patterns: Sequence[str],
    pool: Pool | None,
    where: torch.device,
    preview: Preview | None,
    ready: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> DryRuns:
    """Run each network on a few images, and choose the layers.

    Args:
        subjects: as for `probe_layers`; so are the others.
        samples: the examples.
        looks: of the subjects.
        patterns: of layers.
        pool: from an activation to features.
        where: the networks run.
        preview: called once.
        ready: within it, a network can run.
    """
    networks = [subject for subject in subjects if isinstance(subject, Subject)]
    stored = [subject for subject in subjects if isinstance(subject, StoredFeatures)]
    seen_as, head = looks.seen_as, _head(samples)
    first = (
        next(batches(head, looks.transforms, batch_size=len(head), workers=0, sides=looks.sides)) if networks else []
    )
    if preview is not None:
        preview({s.name: as_pixels(first[seen_as[s.name]], s.preprocessing) for s in networks})
    traces = {}
    for subject in networks:
        with ready(subject.network):
            traces[subject.name] = traced_subject(subject, first[seen_as[subject.name]][:DRY_RUN_IMAGES].to(where))
    picked = {s.name: s.matching(patterns) for s in stored}
    matched = {pattern for s in stored for pattern in patterns if s.matching([pattern])}
    known = [(s.name, s.network, traces[s.name]) for s in networks]
    traced = dict(zip(traces, choose_layers(known, patterns, matched=matched), strict=True))
    if networks:
        _check_class_tokens(pool, list(traced.values()))
    chosen = {**{name: [layer.name for layer in own] for name, own in traced.items()}, **picked}
    labels = tuple(Layer(subject.name, layer) for subject in subjects for layer in chosen[subject.name])
    return DryRuns(labels, traces, traced, picked, bool(networks) and holds_tensors(samples))


def traced_subject(subject: Subject, images: Tensor) -> Trace:
    """A dry run of a subject's network on a few images."""
    try:
        with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, len(images)):
            return trace(subject.network, images)
    except NetworkError as error:
        raise NetworkError(
            wrong_size(subject, images.shape[1:]) or f"{subject.name!r} cannot be run. {error}{advice(error.__cause__)}"
        ) from error


def _head(samples: Samples) -> Samples:
    """The first few, enough for a dry run and a preview."""
    return replace(samples, indices=samples.indices[: max(DRY_RUN_IMAGES, _PREVIEWED)])


def _check_class_tokens(pool: Pool | None, chosen: Sequence[Sequence[TracedLayer]]) -> None:
    if pool == "cls" and not any(layer.layout.prefix_tokens for layers in chosen for layer in layers):
        raise SpecError("--pool cls needs a network with a class token, but none of these layers has one. Use mean.")
