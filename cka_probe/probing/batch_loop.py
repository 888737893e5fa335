"""The batches of a run, dealt out to its processes in rounds: one each."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np
from torch import Tensor

from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.images.batches import Loading, batch_count, batches, default_workers
from cka_probe.images.loading_time import TimedBatches, explaining_lost_workers
from cka_probe.probing.dry_runs import InputVariants
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Probe, Receiver, StoredProbe
from cka_probe.probing.saved_state import RunState
from cka_probe.runtime.devices import on_device

logger = logging.getLogger(__name__)


def run_batches(
    probes: Sequence[Probe | StoredProbe],
    measures: Sequence[Receiver],
    inputs: InputVariants,
    job: Job,
    state: RunState,
) -> None:
    """Run the probes on the batches that are not done yet, and let the measures add each.

    Process r of N has the batches r, r + N, r + 2N, ... of those. In the very first round the others wait for what
    rank 0's batch decides for all.

    Args:
        probes: of the subjects.
        measures: what they hand their features to.
        inputs: of the probes.
        job: for the size of the batches, and the processes that share them.
        state: what the run has so far.
    """
    samples, transforms, seen_as = inputs.samples, inputs.transforms, inputs.seen_as
    world, where, batch_size, workers = job.world, job.where, job.running.batch_size, job.running.workers
    count = default_workers(samples.source, world.on_this_machine) if workers is None else workers
    total, start = batch_count(len(samples), batch_size), state.done
    own = range(start + world.rank, total, world.size)
    images: Generator[list[Tensor], None, None] = ([] for _ in own)
    if transforms:
        loading = Loading(batch_size, count, pin_memory=where.type == "cuda", numbers=own, note=state.copies.note)
        images = explaining_lost_workers(batches(samples, transforms, loading, inputs.sides))
    waiting = TimedBatches(images, where)
    coming = on_device(zip(own, waiting, strict=False), where)

    def run_batch() -> None:
        number, tensors = next(coming)
        first = number * batch_size
        for probe in probes:
            if isinstance(probe, StoredProbe):
                # Stored features that stand beside networks have the order of their samples.
                rows = np.arange(first, min(first + batch_size, len(samples)))
                probe.run(rows if transforms else samples.indices[rows])
                continue
            subject = probe.subject
            with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, batch_size):
                probe.run(tensors[seen_as[subject.name]], number, total)
        if number == 0:
            state.settle()
        state.begin()
        with explaining_out_of_memory("the similarities of the layers", None, batch_size):
            for measure in measures:
                measure.update(first)

    with closing(images), state.saved_when_interrupted():  # an error's traceback would keep worker processes alive
        for first_of_round in range(start, total, world.size):
            if first_of_round == 0 and not world.writes:
                state.settle()
            if first_of_round + world.rank < total:
                run_batch()
            state.end(min(first_of_round + world.size, total))
            if job.progress is not None and world.writes:
                job.progress(min(state.done * batch_size, len(samples)), len(samples))
            if job.merge_often:
                state.merge()
            state.save_if_due()
    state.merge()
    state.save_before_the_end()
    waiting.log(count)
    done = min(total * batch_size, len(samples))
    if done < len(samples):
        logger.info("The last %d images are left out: a batch needs at least 4.", len(samples) - done)
