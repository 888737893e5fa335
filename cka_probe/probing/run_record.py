"""What a run examined, for its record, and what decides its result, by which it is known when it is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cka_probe.activations.trace import Trace
from cka_probe.images.broken import broken_record as broken_record
from cka_probe.images.broken import describe_broken
from cka_probe.images.samples import Samples
from cka_probe.images.samples import fingerprint as images_fingerprint
from cka_probe.networks.models import Subject
from cka_probe.probing.dry_runs import DryRuns, InputVariants
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Probe, StoredProbe
from cka_probe.probing.saved_state import RunState, fingerprint
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.cautions import describe_duplicates
from cka_probe.results.provenance import Duplicates, Provenance
from cka_probe.results.similarity import Layer
from cka_probe.runtime.devices import device_name
from cka_probe.runtime.user_code import naming_errors

logger = logging.getLogger(__name__)


def run_record(
    probes: Sequence[Probe | StoredProbe], inputs: InputVariants, found: DryRuns, job: Job, state: RunState
) -> Provenance:
    """What was examined, for the record, once the probes have run; warns where their precision is in doubt."""
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
    done = min(state.done * job.running.batch_size, len(samples))
    stored = [probe.subject for probe in probes if isinstance(probe, StoredProbe)]
    duplicates = state.copies.record(lambda example: source.identity(int(samples.indices[example])))
    if len(stored) == len(probes) and "duplicates" in stored[0].data:  # found when the features were made
        duplicates = {"duplicates": stored[0].data["duplicates"]}
    if duplicates:
        logger.warning("%s", describe_duplicates(Duplicates(**duplicates["duplicates"]), done))
    broken = broken_record(samples.broken)
    if len(stored) == len(probes) and "broken" in stored[0].data:
        broken = {"broken": stored[0].data["broken"]}
    if samples.broken:
        logger.warning("%s. Left out for all models.", describe_broken(samples.broken))
    pools = {str(subject.source.get("pool", "none")) for subject in stored}
    record = {
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
    return Provenance.from_record(record)


def decisive_settings(
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
            with naming_errors(f"{subject.name!r} must give its weights, but its state_dict() raised"):
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
