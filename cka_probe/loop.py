"""The one probing loop: every network runs on every batch, and each layer's features go to the measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.data import Samples, batches, holds_tensors
from cka_probe.devices import device_name
from cka_probe.errors import FeatureError, NetworkError, SpecError
from cka_probe.features import Pool
from cka_probe.hooks import evaluating
from cka_probe.kernels import MIN_EXAMPLES
from cka_probe.layers import choose_layers
from cka_probe.memory import explaining_out_of_memory, keeping_freed_memory
from cka_probe.models import Subject, as_pixels
from cka_probe.partial import Kept, Partial, fingerprint
from cka_probe.probing import Probe, Receiver, StoredProbe, probes_of
from cka_probe.rounds import Progress, run_batches
from cka_probe.similarity import Layer
from cka_probe.stored_features import StoredFeatures
from cka_probe.trace import DRY_RUN_IMAGES, Trace, TracedLayer, trace
from cka_probe.world import World

logger = logging.getLogger(__name__)

_PREVIEWED = 8

R = TypeVar("R", bound=Receiver)

Preview = Callable[[Mapping[str, NDArray[np.uint8]]], None]


def probe_layers(
    subjects: Sequence[Subject | StoredFeatures],
    samples: Samples,
    start: Callable[[Sequence[Layer]], dict[str, R]],
    *,
    patterns: Sequence[str],
    batch_size: int,
    pool: Pool | None,
    amp: bool = False,
    where: torch.device,
    workers: int | None = None,
    progress: Progress | None = None,
    preview: Preview | None = None,
    world: World | None = None,
    partial: Partial | None = None,
    merge_often: bool = False,
) -> tuple[tuple[Layer, ...], dict[str, R], dict[str, Any]]:
    """The one probing loop: every network runs on every batch, and each layer's features go to the measures.

    Args:
        subjects: networks, and features that are stored.
        samples: the examples, the same for all.
        start: makes the measures, by name, from the labels of all layers, subject by subject.
        patterns: of layers, as for `cka_probe.layers.select`.
        batch_size: as for `compare`; so are the others.
        pool: from an activation to features.
        amp: run the networks in bfloat16 where autocast does.
        where: the networks run.
        workers: processes that decode images.
        progress: called after each batch.
        preview: called once.
        world: the processes that share the batches, each taking every so many-th; this one alone by default.
        partial: where to keep the run so far, and to take it up.
        merge_often: bring what the processes have together after every round of batches, as it is large.

    Returns:
        The labels; the measures, after all batches, on rank 0; and what was examined, for the record.
    """
    world = world or World(where)
    networks = [subject for subject in subjects if isinstance(subject, Subject)]
    stored = [subject for subject in subjects if isinstance(subject, StoredFeatures)]
    tensors = bool(networks) and holds_tensors(samples)
    looks = list(dict.fromkeys(subject.look for subject in networks))
    seen_as = {subject.name: looks.index(subject.look) for subject in networks}
    transforms = [preprocessing.transform(view) for preprocessing, view, _ in looks]
    sides = [side for _, _, side in looks]

    with ExitStack() as stack:
        stack.enter_context(keeping_freed_memory(where))
        for subject in {id(subject.network): subject for subject in networks}.values():  # the views of a model share it
            with explaining_out_of_memory(f"moving {subject.name!r} to {where}", None, batch_size):
                stack.enter_context(evaluating(subject.network, where))
        head = _head(samples)
        first = next(batches(head, transforms, batch_size=len(head), workers=0, sides=sides)) if networks else []
        if preview is not None:
            preview({s.name: as_pixels(first[seen_as[s.name]], s.preprocessing) for s in networks})
        traces = {s.name: traced_subject(s, first[seen_as[s.name]][:DRY_RUN_IMAGES].to(where)) for s in networks}
        picked = {s.name: s.matching(patterns) for s in stored}
        matched = {pattern for s in stored for pattern in patterns if s.matching([pattern])}
        known = [(s.name, s.network, traces[s.name]) for s in networks]
        traced = dict(zip(traces, choose_layers(known, patterns, matched=matched), strict=True))
        if networks:
            _check_class_tokens(pool, list(traced.values()))
        chosen = {**{name: [layer.name for layer in own] for name, own in traced.items()}, **picked}
        labels = tuple(Layer(subject.name, layer) for subject in subjects for layer in chosen[subject.name])
        running = start(labels)
        probes = probes_of(subjects, traces, traced, picked, list(running.values()), pool, amp, where)
        kept = Kept(partial, probes, running, world)
        kept.load(lambda: _settings(subjects, labels, samples, batch_size, pool, amp, where))
        done = run_batches(
            probes, list(running.values()), samples, transforms, sides, seen_as, batch_size=batch_size, where=where,
            workers=workers, progress=progress, world=world, kept=kept, merge_often=merge_often,
        )  # fmt: skip
        for probe in probes:
            probe.precision.finish()
    unsure = world.gathered({index for probe in probes for index in probe.precision.doubtful})
    doubtful = [str(labels[index]) for index in sorted(set().union(*unsure))]
    if doubtful:
        logger.warning(
            "In some batches, float32 was less precise than it should be for %s. Run again with --device cpu, or with "
            "another --seed: how a layer is multiplied on a GPU is decided by the first batch.", ", ".join(doubtful),
        )  # fmt: skip
    source = samples.source
    pools = {str(subject.source.get("pool", "none")) for subject in stored}
    examined = {
        "subjects": [_described(probe, traces, tensors) for probe in probes],
        "data": {
            "source": source.name,
            **({"paired": samples.paired.name} if samples.paired is not None else {}),
            "images": len(source) or None,
            "examples": done,
            "sample_sha256": samples.sha256,
        },
        "layers": list(patterns),
        "batch_size": batch_size,
        "pool": pool if networks or len(pools) > 1 else pools.pop(),
        "amp": amp,
        "device": device_name(where),
    }
    return labels, running, examined


def check_options(batch_size: int, pool: str | None, seed: int, workers: int | None) -> None:
    """Raise where an option has a value that it cannot have: before the work, not after."""
    if batch_size < MIN_EXAMPLES:
        raise FeatureError(
            f"The unbiased HSIC needs at least {MIN_EXAMPLES} examples a batch, but the batch size is {batch_size}."
        )
    if seed < 0 or (workers is not None and workers < 0):
        raise SpecError(f"seed and workers must be 0 or more, but are {seed} and {workers}.")
    if pool not in (None, "none", "mean", "cls"):
        raise SpecError(f"pool must be 'none', 'mean' or 'cls', but is {pool!r}.")


def _head(samples: Samples) -> Samples:
    """The first few, enough for a dry run and a preview."""
    return replace(samples, indices=samples.indices[: max(DRY_RUN_IMAGES, _PREVIEWED)])


def traced_subject(subject: Subject, images: Tensor) -> Trace:
    """A dry run of a subject's network on a few images."""
    try:
        with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, len(images)):
            return trace(subject.network, images)
    except NetworkError as error:
        raise NetworkError(f"{subject.name!r} cannot be run. {error}") from error


def _settings(
    subjects: Sequence[Subject | StoredFeatures],
    labels: Sequence[Layer],
    samples: Samples,
    batch_size: int,
    pool: Pool | None,
    amp: bool,
    where: torch.device,
) -> dict[str, Any]:
    """What decides the result beside the options of the measures, in types that a checkpoint takes."""
    settings: dict[str, Any] = {
        "subjects": [subject.name for subject in subjects],
        "layers": [f"{label.model}: {label.name}" for label in labels],
        "data": [source.name for source in (samples.source, samples.paired) if source is not None],
        "examples": len(samples),
        "sample_sha256": samples.sha256,
        "batch_size": batch_size,
        "pool": pool,
        "amp": amp,
        "device": where.type,
    }
    for subject in subjects:
        if isinstance(subject, Subject):
            settings[f"weights of {subject.name}"] = fingerprint(subject.network)
            settings[f"preprocessing of {subject.name}"] = repr(subject.look)
        else:
            settings[f"features of {subject.name}"] = repr(sorted(subject.source.items()))
    return settings


def _described(probe: Probe | StoredProbe, traces: Mapping[str, Trace], tensors: bool) -> dict[str, Any]:
    subject = probe.subject
    if isinstance(subject, StoredFeatures):
        return {**subject.source, "name": subject.name, "features": dict(probe.features)}
    preprocessing = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(subject.preprocessing).items()
    }
    return {
        "name": subject.name,
        **subject.source,
        "parameters": sum(parameter.numel() for parameter in subject.network.parameters()),
        "preprocessing": "none: the data are tensors" if tensors else preprocessing,
        "view": {"name": subject.view.name, **subject.view.record},
        "features": dict(probe.features),
        "left_out": dict(traces[subject.name].left_out),
    }


def _check_class_tokens(pool: Pool | None, chosen: Sequence[Sequence[TracedLayer]]) -> None:
    if pool == "cls" and not any(layer.layout.prefix_tokens for layers in chosen for layer in layers):
        raise SpecError("--pool cls needs a network with a class token, but none of these layers has one. Use mean.")
