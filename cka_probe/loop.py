"""The one probing loop: every network runs on every batch, and each layer's features go to the measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from cka_probe.copies import Copies
from cka_probe.data import Samples
from cka_probe.data import fingerprint as images_fingerprint
from cka_probe.devices import device_name
from cka_probe.dry_runs import DryRuns, Preview, dry_runs, looks_of
from cka_probe.features import Pool
from cka_probe.findings import copies_told
from cka_probe.forward import naming_errors
from cka_probe.hooks import evaluating
from cka_probe.memory import explaining_out_of_memory, keeping_freed_memory
from cka_probe.models import Subject
from cka_probe.partial import Kept, Partial, fingerprint
from cka_probe.probing import Probe, Receiver, StoredProbe
from cka_probe.randomness import keeping_random_state
from cka_probe.rounds import Progress, run_batches
from cka_probe.similarity import Layer
from cka_probe.stored_features import StoredFeatures
from cka_probe.trace import Trace
from cka_probe.world import World

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Receiver)


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
    seed: int = 0,
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
        seed: of the random numbers of networks that draw some.
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
    looks = looks_of(subjects)
    with ExitStack() as stack:
        stack.enter_context(keeping_freed_memory(where))
        stack.enter_context(keeping_random_state())  # from which loaders of images draw
        networks = [subject for subject in subjects if isinstance(subject, Subject)]
        for subject in {id(subject.network): subject for subject in networks}.values():  # the views of a model share it
            with explaining_out_of_memory(f"moving {subject.name!r} to {where}", None, batch_size):
                stack.enter_context(evaluating(subject.network, where, repr(subject.name)))
        found = dry_runs(subjects, samples, looks, patterns=patterns, pool=pool, where=where, preview=preview)
        running = start(found.labels)
        probes = found.probes(subjects, list(running.values()), pool, amp, where, seed)
        copies = Copies()
        kept = Kept(partial, probes, {**running, "images": copies}, world)
        kept.load(lambda: _settings(subjects, found.labels, samples, batch_size, pool, amp, where))
        done = run_batches(
            probes, list(running.values()), samples, looks.transforms, looks.sides, looks.seen_as,
            batch_size=batch_size, where=where, workers=workers, progress=progress, world=world, kept=kept,
            copies=copies, merge_often=merge_often,
        )  # fmt: skip
    examined = examined_of(
        probes, samples, found, done, patterns=patterns, batch_size=batch_size, pool=pool, amp=amp, where=where,
        world=world, copies=copies,
    )  # fmt: skip
    return found.labels, running, examined


def examined_of(
    probes: Sequence[Probe | StoredProbe],
    samples: Samples,
    found: DryRuns,
    done: int,
    *,
    patterns: Sequence[str],
    batch_size: int,
    pool: Pool | None,
    amp: bool,
    where: torch.device,
    world: World,
    copies: Copies,
) -> dict[str, Any]:
    """What was examined, for the record, once the probes have run; a doubt about their precision is told."""
    for probe in probes:
        probe.precision.finish()
    unsure = world.gathered({index for probe in probes for index in probe.precision.doubtful})
    doubtful = [str(found.labels[index]) for index in sorted(set().union(*unsure))]
    if doubtful:
        logger.warning(
            "In some batches, float32 was less precise than it should be for %s. Run again with --device cpu, or with "
            "another --seed: how a layer is multiplied on a GPU is decided by the first batch.", ", ".join(doubtful),
        )  # fmt: skip
    source = samples.source
    stored = [probe.subject for probe in probes if isinstance(probe, StoredProbe)]
    duplicates = copies.record(lambda example: source.identity(int(samples.indices[example])))
    if len(stored) == len(probes) and "duplicates" in stored[0].data:  # found when the features were made
        duplicates = {"duplicates": stored[0].data["duplicates"]}
    if duplicates:
        logger.warning("%s", copies_told(duplicates["duplicates"], done))
    pools = {str(subject.source.get("pool", "none")) for subject in stored}
    return {
        "subjects": [_described(probe, found.traces, found.tensors) for probe in probes],
        "data": {
            "source": source.name,
            **({"paired": samples.paired.name} if samples.paired is not None else {}),
            "images": len(source) or None,
            "examples": done,
            "sample_sha256": samples.sha256,
            **duplicates,
        },
        "layers": list(patterns),
        "batch_size": batch_size,
        "pool": pool if found.traces or len(pools) > 1 else pools.pop(),
        "amp": amp,
        "device": device_name(where),
    }


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
        "images": images_fingerprint(samples),
        "batch_size": batch_size,
        "pool": pool,
        "amp": amp,
        "device": where.type,
    }
    for subject in subjects:
        if isinstance(subject, Subject):
            with naming_errors(f"{subject.name!r} must tell its weights, but its state_dict() raised"):
                settings[f"weights of {subject.name}"] = fingerprint(subject.network)
            if "code_sha256" in subject.source:
                settings[f"code of {subject.name}"] = subject.source["code_sha256"]
            settings[f"preprocessing of {subject.name}"] = repr(asdict(subject.preprocessing))
            settings[f"view of {subject.name}"] = [subject.view.name, repr(dict(subject.view.record)), subject.side]
        else:
            settings[f"features of {subject.name}"] = repr(sorted(subject.source.items()))
            settings[f"values of {subject.name}"] = subject.fingerprint()
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
