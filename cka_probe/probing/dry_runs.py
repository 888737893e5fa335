"""The dry runs before the loop: which images each subject sees, what its network does, and which layers are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from cka_probe.activations.layers import choose_layers
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.activations.pooling import Pool
from cka_probe.activations.trace import DRY_RUN_IMAGES, Trace, TracedLayer, trace
from cka_probe.errors import NetworkError, SpecError
from cka_probe.images.batches import Loading, Transform, batches
from cka_probe.images.preprocessing import as_pixels
from cka_probe.images.samples import Samples, holds_tensors
from cka_probe.networks.advice import advice, wrong_size
from cka_probe.networks.models import Subject
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Probe, Receiver, StoredProbe, Tap
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.similarity import Layer

_PREVIEWED = 8


@dataclass(frozen=True)
class InputVariants:
    """The examples, and the variants of each image that networks see: subjects with equal preprocessing share one.

    Attributes:
        samples: the examples, the same for all.
        transforms: of each variant, from an image to a network's input; none where all features are stored.
        sides: of each variant, which image of a pair it is.
        seen_as: subject -> the number of its variant.
    """

    samples: Samples
    transforms: Sequence[Transform]
    sides: Sequence[int]
    seen_as: Mapping[str, int]

    @classmethod
    def of(cls, subjects: Sequence[Subject | StoredFeatures], samples: Samples) -> InputVariants:
        """Those that these subjects see."""
        networks = [subject for subject in subjects if isinstance(subject, Subject)]
        variants = list(dict.fromkeys(subject.input_variant for subject in networks))
        return cls(
            samples,
            [preprocessing.transform(view) for preprocessing, view, _ in variants],
            [side for _, _, side in variants],
            {subject.name: variants.index(subject.input_variant) for subject in networks},
        )

    def first(self, examples: int) -> list[Tensor]:
        """So many of the first examples as one batch, a tensor each variant; none where all features are stored."""
        if not self.transforms:
            return []
        head = replace(self.samples, indices=self.samples.indices[:examples])
        return next(batches(head, self.transforms, Loading(len(head)), self.sides))


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
        self, subjects: Sequence[Subject | StoredFeatures], receivers: Sequence[Receiver], job: Job
    ) -> list[Probe | StoredProbe]:
        """A probe of each subject, in their order; the receivers number the layers of all of them in one row."""
        probes: list[Probe | StoredProbe] = []
        first = 0
        for subject in subjects:
            if isinstance(subject, Subject):
                tap = Tap(self.traces[subject.name], self.traced[subject.name], first)
                probes.append(Probe(subject, tap, receivers, job))
                first += len(tap.layers)
            else:
                picked = self.picked[subject.name]
                probes.append(StoredProbe(subject, picked, first, receivers, job.where))
                first += len(picked)
        return probes


def dry_runs(
    subjects: Sequence[Subject | StoredFeatures],
    inputs: InputVariants,
    job: Job,
    ready: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> DryRuns:
    """Run each network on a few images, and choose the layers.

    Args:
        subjects: networks, and features that are stored.
        inputs: of the subjects.
        job: whose layers.
        ready: within it, a network can run.
    """
    patterns, seen_as = job.patterns, inputs.seen_as
    networks = [subject for subject in subjects if isinstance(subject, Subject)]
    stored = [subject for subject in subjects if isinstance(subject, StoredFeatures)]
    first = inputs.first(max(DRY_RUN_IMAGES, _PREVIEWED))
    if job.preview is not None:
        job.preview({s.name: as_pixels(first[seen_as[s.name]], s.preprocessing) for s in networks})
    traces = {}
    for subject in networks:
        with ready(subject.network):
            traces[subject.name] = traced_subject(subject, first[seen_as[subject.name]][:DRY_RUN_IMAGES].to(job.where))
    picked = {s.name: s.matching(patterns) for s in stored}
    matched = {pattern for s in stored for pattern in patterns if s.matching([pattern])}
    known = [(s.name, s.network, traces[s.name]) for s in networks]
    traced = dict(zip(traces, choose_layers(known, patterns, matched=matched), strict=True))
    if networks:
        _check_class_tokens(job.features.pool, list(traced.values()))
    chosen = {**{name: [layer.name for layer in own] for name, own in traced.items()}, **picked}
    labels = tuple(Layer(subject.name, layer) for subject in subjects for layer in chosen[subject.name])
    return DryRuns(labels, traces, traced, picked, bool(networks) and holds_tensors(inputs.samples))


def traced_subject(subject: Subject, images: Tensor) -> Trace:
    """A dry run of a subject's network on a few images."""
    try:
        with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, len(images)):
            return trace(subject.network, images)
    except NetworkError as error:
        raise NetworkError(
            wrong_size(subject, images.shape[1:]) or f"{subject.name!r} cannot be run. {error}{advice(error.__cause__)}"
        ) from error


def _check_class_tokens(pool: Pool | None, chosen: Sequence[Sequence[TracedLayer]]) -> None:
    layouts = [layer.layout for layers in chosen for layer in layers]
    if pool == "cls" and not any(layout.prefix_tokens and layout.class_token for layout in layouts):
        raise SpecError("--pool cls needs a network with a class token, but none of these layers has one. Use mean.")
