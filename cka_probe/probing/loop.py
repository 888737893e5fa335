"""The one probing loop: every network runs on every batch, and each layer's features go to the measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, TypeVar

from cka_probe.activations.hooks import evaluating
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.activations.trace import Trace
from cka_probe.images.broken import recorded as broken_recorded
from cka_probe.images.broken import told as broken_told
from cka_probe.images.samples import Samples
from cka_probe.images.samples import fingerprint as images_fingerprint
from cka_probe.networks.models import Subject
from cka_probe.probing.batch_loop import run_batches
from cka_probe.probing.dry_runs import DryRuns, InputVariants, dry_runs
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Probe, Receiver, StoredProbe
from cka_probe.probing.saved_state import Kept, Partial, fingerprint
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.findings import copies_told
from cka_probe.results.similarity import Layer
from cka_probe.runtime.devices import device_name
from cka_probe.runtime.memory import keeping_freed_memory
from cka_probe.runtime.randomness import keeping_random_state
from cka_probe.runtime.user_code import naming_errors

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Receiver)


def probe_layers(
    subjects: Sequence[Subject | StoredFeatures],
    samples: Samples,
    start: Callable[[Sequence[Layer]], dict[str, R]],
    job: Job,
    partial: Partial | None = None,
) -> tuple[tuple[Layer, ...], dict[str, R], dict[str, Any]]:
    """The one probing loop: every network runs on every batch, and each layer's features go to the measures.

    Args:
        subjects: networks, and features that are stored.
        samples: the examples, the same for all.
        start: makes the measures, by name, from the labels of all layers, subject by subject.
        job: what was asked for.
        partial: where to keep the run so far, and to take it up.

    Returns:
        The labels; the measures, after all batches, on rank 0; and what was examined, for the record.
    """
    inputs, where = InputVariants.of(subjects, samples), job.where
    with ExitStack() as stack:
        stack.enter_context(keeping_freed_memory(where))
        stack.enter_context(keeping_random_state())  # from which loaders of images draw
        networks = [subject for subject in subjects if isinstance(subject, Subject)]
        for subject in {id(subject.network): subject for subject in networks}.values():  # the views of a model share it
            with explaining_out_of_memory(f"moving {subject.name!r} to {where}", None, job.running.batch_size):
                stack.enter_context(evaluating(subject.network, where, repr(subject.name)))
        found = dry_runs(subjects, inputs, job)
        running = start(found.labels)
        probes = found.probes(subjects, list(running.values()), job)
        kept = Kept(partial, probes, running, job.world)
        kept.load(lambda: _settings(subjects, found.labels, samples, job))
        run_batches(probes, list(running.values()), inputs, job, kept)
    return found.labels, running, examined_of(probes, inputs, found, job, kept)


def examined_of(
    probes: Sequence[Probe | StoredProbe], inputs: InputVariants, found: DryRuns, job: Job, kept: Kept
) -> dict[str, Any]:
    """What was examined, for the record, once the probes have run; a doubt about their precision is told."""
    for probe in probes:
        probe.precision.finish()
    unsure = job.world.gathered({index for probe in probes for index in probe.precision.doubtful})
    doubtful = [str(found.labels[index]) for index in sorted(set().union(*unsure))]
    if doubtful:
        logger.warning(
            "In some batches, float32 was less precise than usual for %s: their values may be wrong in the fifth "
            "decimal. Run with --device cpu for more digits.", ", ".join(doubtful),
        )  # fmt: skip
    samples, source = inputs.samples, inputs.samples.source
    done = min(kept.done * job.running.batch_size, len(samples))
    stored = [probe.subject for probe in probes if isinstance(probe, StoredProbe)]
    duplicates = kept.copies.record(lambda example: source.identity(int(samples.indices[example])))
    if len(stored) == len(probes) and "duplicates" in stored[0].data:  # found when the features were made
        duplicates = {"duplicates": stored[0].data["duplicates"]}
    if duplicates:
        logger.warning("%s", copies_told(duplicates["duplicates"], done))
    broken = broken_recorded(samples.broken)
    if len(stored) == len(probes) and "broken" in stored[0].data:
        broken = {"broken": stored[0].data["broken"]}
    if samples.broken:
        logger.warning("%s. Left out for all models.", broken_told(samples.broken))
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
            **broken,
        },
        "layers": list(job.patterns),
        "batch_size": job.running.batch_size,
        "pool": job.features.pool if found.traces or len(pools) > 1 else pools.pop(),
        "amp": job.running.amp,
        "device": device_name(job.where),
    }


def _settings(
    subjects: Sequence[Subject | StoredFeatures], labels: Sequence[Layer], samples: Samples, job: Job
) -> dict[str, Any]:
    """What decides the result beside the options of the measures, in types that a checkpoint takes."""
    settings: dict[str, Any] = {
        "subjects": [subject.name for subject in subjects],
        "layers": [f"{label.model}: {label.name}" for label in labels],
        "data": [source.name for source in (samples.source, samples.paired) if source is not None],
        "examples": len(samples),
        "sample_sha256": samples.sha256,
        "images": images_fingerprint(samples),
        "batch_size": job.running.batch_size,
        "pool": job.features.pool,
        "amp": job.running.amp,
        "device": job.where.type,
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
        **_prefix(traces[subject.name]),
        "left_out": dict(traces[subject.name].left_out),
    }


def _prefix(trace: Trace) -> dict[str, Any]:
    """The tokens that means over tokens leave out, for the record; nothing where there are none."""
    layouts = [layer.layout for layer in trace.layers if layer.layout.prefix_tokens]
    if not layouts:
        return {}
    most = max(layouts, key=lambda layout: layout.prefix_tokens)
    return {"prefix_tokens": {"count": most.prefix_tokens, "class_token": most.class_token}}
