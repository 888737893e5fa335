"""A memory trial: each network of a comparison runs on the first images by itself, and its memory is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.images.batches import batch_count
from cka_probe.networks.models import Subject
from cka_probe.probing.in_turn.memory_plan import NetworkMemory
from cka_probe.probing.probe import Receiver, StoredProbe
from cka_probe.probing.session import Ready, Session
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.runtime import footprint

_FIRST_IMAGES = 4  # CKA needs as many
_LEAST_ROOM = 1 << 28
"""Bytes that a trial may always take, so that the least budget in a message comes from a whole batch if it is small."""

_GAPS = 1.2
"""What networks that run one after the other take of a process, relative to each by itself: gaps stay between them."""


AnySubject: TypeAlias = Subject | StoredFeatures


def by_network(subjects: Sequence[AnySubject]) -> dict[nn.Module | None, list[AnySubject]]:
    """The subjects by their networks, views of one together. Stored features run along with the first."""
    groups: dict[nn.Module | None, list[AnySubject]] = {}
    for subject in subjects:
        if isinstance(subject, Subject):
            groups.setdefault(subject.network, []).append(subject)
    first = next(iter(groups.values()), None)
    if first is None:
        first = groups[None] = []
    first += [subject for subject in subjects if isinstance(subject, StoredFeatures)]
    return groups


@dataclass(frozen=True)
class MemoryTrial:
    """Measures what networks take on the first batch.

    Attributes:
        session: that has been traced.
        receivers: what takes the features, for the trial alone.
        ready: within it, a network can run.
    """

    session: Session
    receivers: Mapping[str, Receiver]
    ready: Ready

    def measure(
        self, subjects: Sequence[Subject | StoredFeatures], batch: Sequence[Tensor], room: int
    ) -> NetworkMemory:
        """What one network takes.

        It runs on a few images, then on the whole batch if that should fit, else on twice as many images, and so on.
        If twice as many should not fit either, the peak is extrapolated to the whole batch.

        Args:
            subjects: the network through all its views, and stored features.
            batch: the first batch, a tensor for each input variant.
            room: bytes that it may take.
        """
        job, seen_as, first = self.session.job, self.session.inputs.seen_as, subjects[0]
        size = min(job.running.batch_size, len(self.session.samples))
        inputs = frozenset(seen_as[subject.name] for subject in subjects if subject.name in seen_as)
        room = max(room - sum(batch[number].nbytes for number in inputs), _LEAST_ROOM)
        name, weights = "the stored features", 0
        with ExitStack() as stack:
            if isinstance(first, Subject):
                name = str(first.source.get("model", first.name))
                weights = -_bytes_on(job.where, first.network)
                stack.enter_context(self.ready(first.network))
                stack.enter_context(explaining_out_of_memory(f"the forward pass of {name!r}", first.network, size))
                weights += _bytes_on(job.where, first.network)
            count = min(_FIRST_IMAGES, size)
            self._peak(subjects, batch, count)  # what is loaded once is no part of the measurement
            layers, peak = self._peak(subjects, batch, count)
            while count < size:
                larger = size if weights + peak * size / count <= room else min(2 * count, size)
                if weights + peak * larger / count > room:
                    break
                count = larger
                layers, peak = self._peak(subjects, batch, count)
        return NetworkMemory(name, weights, round(peak * size / count), layers, inputs)

    def _peak(self, subjects: Sequence[AnySubject], batch: Sequence[Tensor], count: int) -> tuple[int, int]:
        """The layers of these subjects, and the bytes that two passes over the first ``count`` images take."""
        session, receivers = self.session, [*self.receivers.values()]
        job, where = session.job, session.job.where
        # New ones each time: a probe remembers what the first batch decided.
        probes = session.found.probes(session.subjects, receivers, job)
        own = [probe for probe in probes if any(probe.subject is subject for subject in subjects)]
        batches = batch_count(len(session.samples), job.running.batch_size)
        before = footprint.in_use(where)
        footprint.forget_peak(where)
        for probe in own * 2:  # memory that one pass leaves in pieces adds to the peak of the next
            if isinstance(probe, StoredProbe):
                probe.run(np.arange(count))
            else:
                probe.run(batch[session.inputs.seen_as[probe.subject.name]][:count].to(where), 0, batches)
            for receiver in receivers if probe is own[-1] else ():
                receiver.update(0)
        taken = max(footprint.peak(where) - before, 0)
        return sum(len(probe.features) for probe in own), round(taken * (_GAPS if where.type == "cpu" else 1))


def _bytes_on(where: torch.device, network: nn.Module) -> int:
    """Of the weights of a network that are there now."""
    tensors = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.device.type == where.type)
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
