"""Networks that do not fit into memory together run in turn: a survey of what each takes, a plan, and passes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cka_probe.activations.hooks import evaluating
from cka_probe.estimation.gram_file import GramFile, WaitingGrams
from cka_probe.estimation.measure import Accumulator
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.images.samples import Samples
from cka_probe.networks.models import Subject
from cka_probe.probing.dry_runs import InputVariants, dry_runs
from cka_probe.probing.duplicates import Copies
from cka_probe.probing.in_turn.cost import Work
from cka_probe.probing.in_turn.plan import make_plan, timed
from cka_probe.probing.in_turn.resting import Bench
from cka_probe.probing.in_turn.survey import Limits, images_of, survey, units_of
from cka_probe.probing.job import Job, Progress
from cka_probe.probing.loop import examined_of
from cka_probe.probing.probe import Receiver
from cka_probe.probing.rounds import run_batches
from cka_probe.probing.saved_state import Kept
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.similarity import Layer
from cka_probe.runtime import footprint
from cka_probe.runtime.randomness import keeping_random_state

logger = logging.getLogger(__name__)

_GROWTH = 1.03
"""What a process takes later, relative to now: threads, caches, code that is loaded when it is needed."""


@dataclass(frozen=True)
class Frugality:
    """That memory is limited.

    Attributes:
        budget: bytes: of the GPU the networks run on, else of this process.
        bench: where networks rest between their turns.
        scratch: folder for the Gram matrices that wait.
        work: what is measured; its layers are not known yet.
    """

    budget: int
    bench: Bench
    scratch: str | Path | None
    work: Work


@keeping_random_state()  # from which loaders of images draw
def probe_in_turns(
    subjects: Sequence[Subject | StoredFeatures],
    samples: Samples,
    start: Callable[[Sequence[Layer]], dict[str, Accumulator]],
    job: Job,
    frugality: Frugality,
) -> tuple[tuple[Layer, ...], dict[str, Accumulator], dict[str, Any]]:
    """As `cka_probe.probing.loop.probe_layers`, within a budget of memory: in one pass where all fits, else in several.

    What it will take is told before it starts, and recorded beside what it took. The result is that of one pass, bit
    for bit: each network sees the same batches, and its Gram matrices wait in a file as they are.

    Args:
        subjects: as for `probe_layers`; so are the others.
        samples: the examples.
        start: makes the measures.
        job: what was asked for; its progress is told of the images of all passes.
        frugality: the budget, of each process.

    Raises:
        SpecError: the budget is too small for any plan; the message says the least that would do.
    """
    bench, scratch, budget, world, where = frugality.bench, frugality.scratch, frugality.budget, job.world, job.where

    @contextmanager
    def ready(network: nn.Module) -> Iterator[None]:
        with bench.awake(network), evaluating(network, where, named[network]):
            yield

    inputs, units = InputVariants.of(subjects, samples), units_of(subjects)
    named = {unit.network: repr(unit.name) for unit in units}
    found = dry_runs(subjects, inputs, job, ready)
    labels = [f"layer {layer.name!r} of {layer.model!r}" for layer in found.labels]
    work = replace(frugality.work, layers=len(found.labels), processes=world.size)
    trial, kept = waiting(start(found.labels), labels, scratch)
    images = images_of(inputs, job)
    resident = footprint.in_use(where)
    tried = list(trial.values())
    limits = Limits(job, images, resident, budget, ready)
    costs = survey(units, found.probes(subjects, tried, job), tried, inputs, limits)
    resident = max(resident, footprint.in_use(where))
    if where.type == "cpu":
        resident = round(resident * _GROWTH)
    costs, images, resident = world.from_first((costs, images, resident))  # so that all have the same plan
    plan = make_plan(costs, work, images, resident=resident, budget=budget)
    if world.writes:
        plan = timed(plan, images, sum(grams.seconds_a_batch(where) for grams in kept))
    plan = world.from_first(plan)
    del trial, kept
    for line in plan.told():
        logger.info("%s", line)

    footprint.forget_peak(where)
    started = time.perf_counter()
    running = start(found.labels)
    receivers, kept = waiting(running, labels, scratch) if plan.waits else (dict[str, Receiver](running), [])
    # Measures that need all examples are brought together once, when they have all layers.
    merged = {name: receiver for name, receiver in receivers.items() if receiver in kept} if plan.waits else receivers
    probes = found.probes(subjects, list(receivers.values()), job)
    copies = Copies()
    for number, group in enumerate(plan.groups):
        footprint.give_back()
        if len(plan.groups) > 1:
            logger.info("Pass %d of %d", number + 1, len(plan.groups))
        some = [subject for index in group for subject in units[index].subjects]
        names = {subject.name for subject in some}
        own = [probe for probe in probes if probe.subject.name in names]
        with ExitStack() as stack:
            for network in {subject.network: None for subject in some if isinstance(subject, Subject)}:
                stack.enter_context(ready(network))
            kept_now = Kept(None, own, merged, world, copies)
            of_pass = replace(job, progress=_of_all_passes(job.progress, number, len(plan.groups)))
            run_batches(own, list(receivers.values()), InputVariants.of(some, samples), of_pass, kept_now)
    for grams in kept:
        grams.put_together(where)
    if plan.waits and world.size > 1:
        for measure in running.values():
            measure.merge(world)
    took = {"seconds": round(time.perf_counter() - started, 2), "peak_bytes": footprint.peak(where)}
    examined = examined_of(probes, inputs, found, job, kept_now)
    return found.labels, running, {**examined, "plan": {**plan.record(), "measured": took}}


def waiting(
    measures: Mapping[str, Accumulator], labels: Sequence[str], folder: str | Path | None
) -> tuple[dict[str, Receiver], list[WaitingGrams]]:
    """What takes the features while networks run in turn, and what of it is to be put together at the end.

    Measures that need all examples keep features layer by layer anyway, and take them as they come.
    """
    receivers = {
        name: WaitingGrams(measure, labels, GramFile(folder)) if isinstance(measure, StreamingCKA) else measure
        for name, measure in measures.items()
    }
    return dict(receivers), [receiver for receiver in receivers.values() if isinstance(receiver, WaitingGrams)]


def _of_all_passes(progress: Progress | None, number: int, passes: int) -> Progress:
    """Progress that counts the images once a pass, and lets no freed memory pile up from batch to batch."""

    def told(done: int, total: int) -> None:
        footprint.give_back()
        if progress is not None:
            progress(number * total + done, passes * total)

    return told
