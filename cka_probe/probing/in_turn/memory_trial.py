"""A memory trial: each network of a comparison runs on the first images by itself, and its memory is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.images.batches import batch_count
from cka_probe.networks.models import Subject
from cka_probe.probing.dry_runs import DryRuns, InputVariants
from cka_probe.probing.in_turn.memory_plan import NetworkMemory
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Receiver, StoredProbe
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.runtime import footprint

_FIRST_IMAGES = 4  # CKA needs as many
_LEAST_ROOM = 1 << 28
"""Bytes that a trial may always take, so that the least budget in a message comes from a whole batch if it is small."""

_PASSES = 2  # over the same images: memory that one leaves in pieces adds to the peak of the next

_GAPS = 1.2
"""What networks that run one after the other take of a process, relative to each by itself: gaps stay between them."""


@dataclass(frozen=True)
class NetworkViews:
    """One network with the subjects that share it: they run together. The first takes the stored features along.

    Attributes:
        name: for messages.
        network: None if there are stored features alone.
        subjects: the network through its views, and stored features.
    """

    name: str
    network: nn.Module | None
    subjects: tuple[Subject | StoredFeatures, ...]


def by_network(subjects: Sequence[Subject | StoredFeatures]) -> list[NetworkViews]:
    """The subjects by their networks, in their order."""
    stored = tuple(subject for subject in subjects if isinstance(subject, StoredFeatures))
    networks: dict[nn.Module, list[Subject]] = {}
    for subject in subjects:
        if isinstance(subject, Subject):
            networks.setdefault(subject.network, []).append(subject)
    if not networks:
        return [NetworkViews("the stored features", None, stored)]
    first, *others = (
        NetworkViews(str(views[0].source.get("model", views[0].name)), network, tuple(views))
        for network, views in networks.items()
    )
    return [replace(first, subjects=(*first.subjects, *stored)), *others]


@dataclass(frozen=True)
class MemoryTrial:
    """Measures what networks take on the first batch.

    Attributes:
        found: the dry runs of all subjects.
        subjects: all of them.
        job: what was asked for.
        receivers: what takes the features, for the trial alone.
        inputs: of all subjects.
        ready: within it, a network can run.
    """

    found: DryRuns
    subjects: Sequence[Subject | StoredFeatures]
    job: Job
    receivers: Sequence[Receiver]
    inputs: InputVariants
    ready: Callable[[nn.Module], AbstractContextManager[Any]]

    def measure(self, views: NetworkViews, batch: Sequence[Tensor], room: int) -> NetworkMemory:
        """What a network takes, through all its views.

        It runs on a few images, then on the whole batch if that should fit, else on twice as many images, and so on.
        If twice as many should not fit either, the peak is extrapolated to the whole batch.

        Args:
            views: of the network.
            batch: the first batch, a tensor for each input variant.
            room: bytes that it may take.
        """
        where, names = self.job.where, {subject.name for subject in views.subjects}
        size = min(self.job.running.batch_size, len(self.inputs.samples))
        inputs = frozenset(number for name, number in self.inputs.seen_as.items() if name in names)
        room = max(room - sum(batch[number].nbytes for number in inputs), _LEAST_ROOM)
        with ExitStack() as stack:
            weights = 0
            if views.network is not None:
                weights -= _bytes_on(where, views.network)
                stack.enter_context(self.ready(views.network))
                stack.enter_context(
                    explaining_out_of_memory(f"the forward pass of {views.name!r}", views.network, size)
                )
                weights += _bytes_on(where, views.network)
            count = min(_FIRST_IMAGES, size)
            self._peak(names, batch, count)  # what is loaded once is no part of the measurement
            layers, peak = self._peak(names, batch, count)
            while count < size:
                larger = size if weights + peak * size / count <= room else min(2 * count, size)
                if weights + peak * larger / count > room:
                    break
                count = larger
                layers, peak = self._peak(names, batch, count)
        return NetworkMemory(views.name, weights, round(peak * size / count), layers, inputs)

    def _peak(self, names: set[str], batch: Sequence[Tensor], count: int) -> tuple[int, int]:
        """The layers of these subjects, and the bytes that their passes over the first ``count`` images take."""
        where = self.job.where
        # New ones each time: a probe remembers what the first batch decided.
        probes = self.found.probes(self.subjects, self.receivers, self.job)
        own = [probe for probe in probes if probe.subject.name in names]
        before = footprint.in_use(where)
        footprint.forget_peak(where)
        batches = batch_count(len(self.inputs.samples), self.job.running.batch_size)
        for _ in range(_PASSES):
            for probe in own:
                if isinstance(probe, StoredProbe):
                    probe.run(np.arange(count))
                else:
                    images = batch[self.inputs.seen_as[probe.subject.name]][:count].to(where)
                    probe.run(images, 0, batches)
            for receiver in self.receivers:
                receiver.update(0)
        taken = max(footprint.peak(where) - before, 0)
        return sum(len(probe.features) for probe in own), round(taken * (_GAPS if where.type == "cpu" else 1))


def _bytes_on(where: torch.device, network: nn.Module) -> int:
    """Of the weights of a network that are there now."""
    tensors = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.device.type == where.type)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
