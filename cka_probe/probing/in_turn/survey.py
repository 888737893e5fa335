"""What each network of a comparison takes, found by running it on a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.estimation.precision import Precision
from cka_probe.images.batches import Loading, Transform, batch_count, batches, default_workers
from cka_probe.networks.models import Subject
from cka_probe.probing.dry_runs import InputVariants
from cka_probe.probing.in_turn.cost import ImageCost, NetworkCost
from cka_probe.probing.in_turn.ledger import count_operations
from cka_probe.probing.job import Job
from cka_probe.probing.probe import Probe, Receiver, StoredProbe
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.runtime import footprint
from cka_probe.runtime.devices import cores

_COUNTED_IMAGES = 4  # CKA needs as many
_LEAST_SECONDS = 0.3  # that a network is timed for
_MOST_BATCHES = 5
_TIMED_IMAGES = 32
_INSIDE = 1.25
"""What a forward pass takes, relative to its intermediate results: convolutions also hold their inputs rearranged."""

_GAPS = 1.2
"""What networks that run one after the other take of a process, relative to each by itself: gaps stay between them."""

Ready = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Unit:
    """What runs or waits as a whole: the subjects of one network. The first one takes the stored features along.

    Attributes:
        name: for messages.
        network: None where there are stored features alone.
        subjects: the network through its views, and stored features.
    """

    name: str
    network: nn.Module | None
    subjects: tuple[Subject | StoredFeatures, ...]


def units_of(subjects: Sequence[Subject | StoredFeatures]) -> list[Unit]:
    """The subjects by their networks, in their order."""
    stored = tuple(subject for subject in subjects if isinstance(subject, StoredFeatures))
    by_network: dict[nn.Module, list[Subject]] = {}
    for subject in subjects:
        if isinstance(subject, Subject):
            by_network.setdefault(subject.network, []).append(subject)
    if not by_network:
        return [Unit("the stored features", None, stored)]
    units = [
        Unit(str(views[0].source.get("model", views[0].name)), network, tuple(views))
        for network, views in by_network.items()
    ]
    return [replace(units[0], subjects=(*units[0].subjects, *stored)), *units[1:]]


@dataclass(frozen=True)
class Limits:
    """What the units are measured within.

    Attributes:
        job: what was asked for.
        images: what it takes to have them.
        resident: bytes that are in use while no network runs.
        budget: bytes that may be in use: a unit that does not fit by itself is only counted.
        ready: within it, a network can run.
    """

    job: Job
    images: ImageCost
    resident: int
    budget: int
    ready: Ready


def survey(
    units: Sequence[Unit],
    probes: Sequence[Probe | StoredProbe],
    trial: Sequence[Receiver],
    inputs: InputVariants,
    limits: Limits,
) -> list[NetworkCost]:
    """What each unit takes, each by itself on the first batch: counted on a few images of it, then measured.

    Args:
        units: of all subjects.
        probes: of all subjects, for this alone: they remember the first batch that they see.
        trial: what takes the features, for the same reason for this alone; each is updated after each unit.
        inputs: of all subjects.
        limits: the memory that there is.
    """
    batch_size, where, examples = limits.job.running.batch_size, limits.job.where, len(inputs.samples)
    size = min(batch_size, examples)
    batch = inputs.first(size)
    few = min(_COUNTED_IMAGES, size)
    costs = []
    for unit in units:
        names = {subject.name for subject in unit.subjects}
        own = [probe for probe in probes if probe.subject.name in names]
        run = _Trial(own, trial, inputs.seen_as, batch, where, batch_count(examples, batch_size))
        with ExitStack() as stack:
            weights = 0
            if unit.network is not None:
                weights -= _bytes_on(where, unit.network)
                stack.enter_context(limits.ready(unit.network))
                stack.enter_context(explaining_out_of_memory(f"the forward pass of {unit.name!r}", unit.network, size))
                weights += _bytes_on(where, unit.network)
            counted = count_operations(partial(run, few))
            for probe in run.probes:
                probe.precision = Precision()  # a few images decide nothing
            cost = NetworkCost(
                unit.name, weights, round(counted.alive / few * size * _INSIDE), counted.flops / few,
                counted.moved / few, [width for probe in run.probes for width in probe.features.values()],
                frozenset(inputs.seen_as[name] for name in names if name in inputs.seen_as),
            )  # fmt: skip
            if limits.resident + weights + cost.working + limits.images.held(cost.looks, size) <= limits.budget:
                cost = _measured(cost, run, size, where)
        costs.append(cost)
    return costs


def images_of(inputs: InputVariants, job: Job) -> ImageCost:
    """What it takes to have the images, by reading some of them."""
    samples, world, workers = inputs.samples, job.world, job.running.workers
    some = replace(samples, indices=samples.indices[:_TIMED_IMAGES])

    def read(transforms: Sequence[Transform], sides: Sequence[int]) -> tuple[float, int]:
        started = time.perf_counter()
        (batch,) = batches(some, transforms, Loading(len(some)), sides)
        return (time.perf_counter() - started) / len(some), batch[0][0].nbytes

    if not inputs.sides:
        return ImageCost([], [], 0)
    alone, _ = read([_nothing], [0])
    found = [read([transform], [side]) for transform, side in zip(inputs.transforms, inputs.sides, strict=True)]
    return ImageCost(
        [size for _, size in found],
        [max(seconds - alone, 0) for seconds, _ in found],
        alone,
        default_workers(samples.source, world.on_this_machine) if workers is None else workers,
        torch.get_num_threads() if world.device.type == "cpu" else 0,
        max(cores() // world.on_this_machine, 1),
    )


@dataclass(frozen=True)
class _Trial:
    """Runs the probes of a unit on the first few images of a batch, and lets the measures go on."""

    probes: Sequence[Probe | StoredProbe]
    measures: Sequence[Receiver]
    seen_as: Mapping[str, int]
    batch: Sequence[Tensor]
    where: torch.device
    batches: int

    def __call__(self, count: int) -> None:
        for probe in self.probes:
            if isinstance(probe, StoredProbe):
                probe.run(np.arange(count))
            else:
                probe.run(self.batch[self.seen_as[probe.subject.name]][:count].to(self.where), 0, self.batches)
        for measure in self.measures:
            measure.update(0)
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)


def _measured(cost: NetworkCost, run: _Trial, size: int, where: torch.device) -> NetworkCost:
    """The cost with the memory and the time of whole batches. The first of them warms up, and is not timed."""
    before = footprint.in_use(where)
    footprint.forget_peak(where)
    run(size)
    count, started = 0, time.perf_counter()
    while count == 0 or (time.perf_counter() - started < _LEAST_SECONDS and count < _MOST_BATCHES):
        run(size)
        count += 1
    seconds = (time.perf_counter() - started) / count
    working = footprint.peak(where) - before
    if where.type == "cpu":
        working = round(working * _GAPS)
    return replace(cost, seconds=seconds, working=working if working > 0 else cost.working)


def _bytes_on(where: torch.device, network: nn.Module) -> int:
    """Of the weights of a network that are there now."""
    tensors = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.device.type == where.type)
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _nothing(image: Any, identity: str) -> Tensor:
    return torch.empty(0)
