"""The one probing loop: every network runs on every batch, and each layer's features go to the measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.data import Samples, Transform, batches, default_workers, holds_tensors
from cka_probe.devices import device_name, on_device
from cka_probe.errors import FeatureError, NetworkError, SpecError
from cka_probe.features import Pool
from cka_probe.hooks import evaluating
from cka_probe.kernels import MIN_EXAMPLES
from cka_probe.layers import choose_layers
from cka_probe.memory import explaining_out_of_memory, keeping_freed_memory
from cka_probe.models import Subject, as_pixels
from cka_probe.probing import Probe, Receiver, StoredProbe, probes_of
from cka_probe.similarity import Layer
from cka_probe.stored_features import StoredFeatures
from cka_probe.trace import DRY_RUN_IMAGES, Trace, TracedLayer, trace

logger = logging.getLogger(__name__)

_PREVIEWED = 8

R = TypeVar("R", bound=Receiver)

Progress = Callable[[int, int], None]
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

    Returns:
        The labels; the measures, after all batches; and what was examined, for the record.
    """
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
        count = default_workers(samples.source) if workers is None else workers
        done = 0
        rounds = _rounds(samples, transforms, sides, batch_size, count, where)
        for rows, images in on_device(rounds, where):
            for probe in probes:
                if isinstance(probe, StoredProbe):
                    probe.run(rows)
                    continue
                subject = probe.subject
                with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, batch_size):
                    probe.run(images[seen_as[subject.name]])
            with explaining_out_of_memory(f"the similarities of {len(labels)} layers", None, batch_size):
                for measure in running.values():
                    measure.update(done)
            done += len(rows)
            if progress is not None:
                progress(done, len(samples))

        for probe in probes:
            probe.precision.finish()
    doubtful = [str(labels[index]) for probe in probes for index in sorted(probe.precision.doubtful)]
    if doubtful:
        logger.warning(
            "In some batches, float32 was less precise than it should be for %s. Run again with --device cpu, or with "
            "another --seed: how a layer is multiplied on a GPU is decided by the first batch.", ", ".join(doubtful),
        )  # fmt: skip
    if done < len(samples):
        logger.info("The last %d images are left out: a batch needs at least 4.", len(samples) - done)
    source = samples.source
    pools = {str(subject.source.get("pool", "none")) for subject in stored}
    examined = {
        "subjects": [_described(probe, traces, tensors) for probe in probes],
        "data": {
            "source": source.name,
            **({"paired": samples.paired.name} if samples.paired is not None else {}),
            "images": len(source),
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


def _rounds(
    samples: Samples,
    transforms: Sequence[Transform],
    sides: Sequence[int],
    batch_size: int,
    workers: int,
    where: torch.device,
) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
    """Batch by batch, the rows of stored features and the images of the networks, one tensor a transform."""
    if transforms:
        done = 0  # stored features that stand beside networks have the order of their samples
        for batch in batches(
            samples, transforms, batch_size=batch_size, workers=workers, pin_memory=where.type == "cuda", sides=sides
        ):
            yield range(done, done + len(batch[0])), batch
            done += len(batch[0])
        return
    for first in range(0, len(samples), batch_size):
        rows = samples.indices[first : first + batch_size]
        if len(rows) >= MIN_EXAMPLES:
            yield rows, []


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
