"""Networks that do not fit into memory together run one after the other: a memory trial of each, a plan, and passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from cka_probe.activations.hooks import evaluating
from cka_probe.errors import SpecError
from cka_probe.estimation.gram_file import GramFile, StoredGrams
from cka_probe.estimation.measure import Accumulator
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.images.samples import Samples
from cka_probe.networks.models import Subject
from cka_probe.probing.in_turn.memory_plan import Plan, Workload, make_plan
from cka_probe.probing.in_turn.memory_trial import MemoryTrial, by_network
from cka_probe.probing.in_turn.weight_offload import WeightOffload
from cka_probe.probing.job import Job
from cka_probe.probing.options import Measuring
from cka_probe.probing.probe import Receiver
from cka_probe.probing.session import Session
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer
from cka_probe.runtime import footprint

logger = logging.getLogger(__name__)

_GROWTH = 1.03
"""What a process takes later, relative to now: threads, caches, code that is loaded when it is needed."""

Start = Callable[[Sequence[Layer]], dict[str, Accumulator]]


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a run may take.

    Attributes:
        limit: bytes: of the GPU the networks run on, else of this process.
        offload: keeps the weights of networks that do not run.
        scratch: folder for Gram matrices.
    """

    limit: int
    offload: WeightOffload
    scratch: str | Path | None


def probe_in_turn(
    subjects: Sequence[Subject | StoredFeatures], samples: Samples, start: Start, job: Job, budget: MemoryBudget
) -> tuple[tuple[Layer, ...], dict[str, Accumulator], Provenance]:
    """A session within a memory limit: all networks in one pass if they fit together, else in several.

    The plan is logged before the run, and recorded beside the peak that was measured. The result is that of one pass,
    bit for bit: each network sees the same batches, and its Gram matrices are stored as they are.

    Args:
        subjects: networks, and features that are stored.
        samples: the examples.
        start: makes the measures.
        job: what was asked for; its progress counts the images of all passes.
        budget: of each process.

    Returns:
        The layers; the measures after all batches, on rank 0; and what was examined, for the record.

    Raises:
        SpecError: no plan fits; the message gives the least budget that would do. Or the system does not report the
            memory of a process.
    """
    world, where, networks = job.world, job.where, by_network(subjects)
    if where.type == "cpu" and not footprint.in_use(where):
        raise SpecError("--memory on a CPU needs Linux, which reports the memory of a process. Run without --memory.")

    @contextmanager
    def ready(network: nn.Module) -> Iterator[None]:
        footprint.give_back()
        name = repr(networks[network][0].name)
        with budget.offload.loaded(network), evaluating(network, where, name):
            yield

    job = replace(job, before_network=footprint.give_back)
    with Session(subjects, samples, job, ready) as session:
        layers = session.trace()
        receivers, _ = _storing(start(layers), layers, budget.scratch)
        plan = _planned(MemoryTrial(session, receivers, ready), [*networks.values()], budget.limit)
        plan = world.from_first(plan)  # so that all have the same
        del receivers
        for line in plan.describe():
            logger.info("%s", line)

        footprint.forget_peak(where)
        running, stored = start(layers), list[StoredGrams]()
        receivers = dict[str, Receiver](running)
        if plan.stored:
            receivers, stored = _storing(running, layers, budget.scratch)
        # Measures that need all examples are merged once, when they have all layers.
        merged = {name: one for name, one in receivers.items() if not plan.stored or one in stored}
        each = [*networks.values()]
        groups = [[subject for index in group for subject in each[index]] for group in plan.passes]
        session.run(receivers, groups=groups, merged=merged)
        for grams in stored:
            grams.put_together(where)
        if plan.stored and world.size > 1:
            for measure in running.values():
                measure.merge(world)
        record = {**plan.record(), "measured": {"peak_bytes": footprint.peak(where)}}
        return layers, running, replace(session.record(), plan=record)


def _planned(trial: MemoryTrial, networks: Sequence[Sequence[Subject | StoredFeatures]], limit: int) -> Plan:
    """The plan, from a trial of each network by itself."""
    session, job = trial.session, trial.session.job
    where, measuring, examples = job.where, job.features, len(session.samples)
    assert isinstance(measuring, Measuring)
    size = min(job.running.batch_size, examples)
    process = footprint.in_use(where)
    batch = session.inputs.first(size)
    measured = [trial.measure(views, batch, limit - process) for views in networks]
    images = [tensor.nbytes for tensor in batch]
    del batch
    process = max(process, footprint.in_use(where))
    grams = [measure.gram_bytes for measure in measuring.parsed() if measure.gram_bytes]
    workload = Workload(
        round(process * _GROWTH) if where.type == "cpu" else process, images, examples, size, sum(grams), len(grams),
        measuring.permutations, bool(measuring.influence), job.world.size,
    )  # fmt: skip
    return make_plan(measured, workload, limit)


def _storing(
    measures: Mapping[str, Accumulator], layers: Sequence[Layer], folder: str | Path | None
) -> tuple[dict[str, Receiver], list[StoredGrams]]:
    """What takes the features while networks run one after the other, and what of it is put together at the end.

    Measures that need all examples keep features layer by layer anyway, and take them as they come.
    """
    labels = [f"layer {layer.name!r} of {layer.model!r}" for layer in layers]
    receivers = {
        name: StoredGrams(measure, labels, GramFile(folder)) if isinstance(measure, StreamingCKA) else measure
        for name, measure in measures.items()
    }
    return dict(receivers), [receiver for receiver in receivers.values() if isinstance(receiver, StoredGrams)]
