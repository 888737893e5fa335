"""A session: networks and stored features on the same images, and the passes over them that feed measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from cka_probe.activations.hooks import evaluating
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.images.samples import Samples
from cka_probe.networks.models import Subject
from cka_probe.probing.batch_loop import run_batches
from cka_probe.probing.dry_runs import DryRuns, InputVariants, dry_runs
from cka_probe.probing.duplicates import Duplicates
from cka_probe.probing.job import Job, Progress
from cka_probe.probing.probe import Probe, Receiver, StoredProbe
from cka_probe.probing.run_record import decisive_settings, run_record
from cka_probe.probing.saved_state import Checkpoints, RunState
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer
from cka_probe.runtime.memory import keeping_freed_memory
from cka_probe.runtime.randomness import keeping_random_state

logger = logging.getLogger(__name__)

Ready = Callable[[nn.Module], AbstractContextManager[Any]]


class Session:
    """Networks and stored features on the same images: `trace` finds their layers, `run` feeds receivers with them.

    A context manager. Within it the networks are in evaluation mode on the device of the job; afterwards they are as
    they were.

    Args:
        subjects: networks, and features that are stored.
        samples: the examples, the same for all.
        job: what was asked for.
        ready: a context within which a network can run, where not all are to be in memory at once.

    Attributes:
        inputs: what the subjects see of each image.
        found: what `trace` found.
    """

    def __init__(
        self, subjects: Sequence[Subject | StoredFeatures], samples: Samples, job: Job, ready: Ready | None = None
    ) -> None:
        self.subjects, self.samples, self.job = subjects, samples, job
        self.inputs = InputVariants.of(subjects, samples)
        self.found: DryRuns
        self._at_once = ready is None
        self._ready: Ready = ready or nullcontext
        self._stack = ExitStack()
        self._probes: list[Probe | StoredProbe] = []
        self._state: RunState

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            stack.enter_context(keeping_random_state())  # from which loaders of images draw
            if self._at_once:
                stack.enter_context(keeping_freed_memory(self.job.where))
                self._load_all(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def trace(self) -> tuple[Layer, ...]:
        """Run each network on a few images, and choose the layers.

        Returns:
            The layers of all subjects, one after the other, in forward order.

        Raises:
            NetworkError: a network cannot be run.
            SpecError: the layers that were asked for are not there.
        """
        self.found = dry_runs(self.subjects, self.inputs, self.job, self._ready)
        return self.found.labels

    def run(
        self,
        receivers: Mapping[str, Receiver],
        saved: Checkpoints | None = None,
        *,
        groups: Sequence[Sequence[Subject | StoredFeatures]] = (),
        merged: Mapping[str, Receiver] | None = None,
    ) -> None:
        """Run every network on every batch, and hand the features of its layers to the receivers.

        Args:
            receivers: measures, or what writes features down, by name. After the run rank 0 has what all processes
                gathered.
            saved: where the run is saved now and then, and taken up.
            groups: of the subjects, each of which has a pass of its own; all in one pass where empty.
            merged: the receivers whose parts are brought to rank 0 in each pass; all where None.
        """
        self._probes = self.found.probes(self.subjects, list(receivers.values()), self.job)
        duplicates, passes = Duplicates(), groups or [self.subjects]
        for number, group in enumerate(passes):
            if len(passes) > 1:
                logger.info("Pass %d of %d", number + 1, len(passes))
            own = [probe for probe in self._probes if any(probe.subject is subject for subject in group)]
            inputs = InputVariants.of(group, self.samples) if groups else self.inputs
            job = replace(self.job, progress=_of_all_passes(self.job.progress, number, len(passes)))
            with ExitStack() as stack:
                for network in {subject.network: None for subject in group if isinstance(subject, Subject)}:
                    stack.enter_context(self._ready(network))
                state = RunState(saved, own, receivers if merged is None else merged, self.job.world, duplicates)
                state.load(lambda: decisive_settings(self.subjects, self.found.labels, self.samples, self.job))
                run_batches(own, list(receivers.values()), inputs, job, state)
            self._state = state

    def record(self) -> Provenance:
        """What was examined, for the record of the run; warns of what makes it doubtful."""
        return run_record(self._probes, self.inputs, self.found, self.job, self._state)

    def _load_all(self, stack: ExitStack) -> None:
        networks = {id(subject.network): subject for subject in self.subjects if isinstance(subject, Subject)}
        for subject in networks.values():  # the views of a model share it
            what = f"moving {subject.name!r} to {self.job.where}"
            with explaining_out_of_memory(what, None, self.job.running.batch_size):
                stack.enter_context(evaluating(subject.network, self.job.where, repr(subject.name)))


def _of_all_passes(progress: Progress | None, number: int, passes: int) -> Progress | None:
    """Progress that counts the images once per pass."""
    if progress is None or passes == 1:
        return progress
    return lambda done, total: progress(number * total + done, passes * total)
