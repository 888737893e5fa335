"""The plan of a comparison with --memory: which networks run together, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.runtime.sizes import format_bytes


@dataclass(frozen=True)
class NetworkMemory:
    """What one network takes, through all its views, in bytes.

    Attributes:
        name: for messages.
        weights: beyond those that are in memory even while it does not run.
        peak: of a forward pass of one batch with its hooks, beyond its weights and the images.
        layers: how many are compared.
        inputs: the numbers of the input variants that it sees.
    """

    name: str
    weights: int
    peak: int
    layers: int = 0
    inputs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Workload:
    """What a run takes besides its networks.

    Attributes:
        process: bytes in use while no network runs.
        images: of each input variant, the bytes of one batch.
        examples: images in all.
        batch: images at a time, n.
        gram_bytes: of an entry of the Gram matrices of one layer, of all streaming measures together.
        streaming: how many measures add up Gram matrices batch by batch.
        permutations: of a permutation test.
        influence: whether each example is left out.
        processes: that share the batches; memory and files are those of one of them.
    """

    process: int
    images: Sequence[int]
    examples: int
    batch: int
    gram_bytes: int = 4
    streaming: int = 1
    permutations: int = 0
    influence: bool = False
    processes: int = 1

    def sums(self, layers: int) -> dict[str, int]:
        """What the streaming measures hold of all layers together, in bytes, by part."""
        count, pairs, n, matrices = self.streaming, layers**2, self.batch, layers * self.batch**2
        if not count:
            return {}
        parts = {"triangles": count * (8 * matrices + 16 * n**2 + max(1 << 22, 8 * n**2) + 80 * pairs)}
        if self.permutations:  # the sums, and the test of them at the end; each permutation moves the triangles
            parts["permutations"] = count * 8 * pairs * self.permutations * 5 + 4 * matrices + 24 * n**2
        if self.influence:  # what is kept, and the matrices made whole again
            parts["influence"] = count * 12 * pairs * self.examples + 16 * pairs * n + 24 * matrices
        return parts

    def of_pass(self, networks: Sequence[NetworkMemory]) -> dict[str, int]:
        """What these networks take when they run on the same batches, one after the other."""
        inputs = frozenset[int]().union(*(network.inputs for network in networks))
        return {
            "process": self.process,
            "weights": sum(network.weights for network in networks),
            "activations": max(network.peak for network in networks),
            "images": 2 * sum(self.images[number] for number in inputs),  # the next batch is loaded meanwhile
            "Gram matrices": sum(network.layers for network in networks) * self.batch**2 * self.gram_bytes,
        }


@dataclass(frozen=True)
class Plan:
    """Which networks run together, pass by pass.

    Attributes:
        passes: the numbers of the networks in each.
        names: of the networks in each.
        memory: of the part of the run that takes most: what for -> bytes.
        budget: bytes of memory.
        stored: whether Gram matrices wait in a file and are put together at the end.
        disk: bytes of that file.
    """

    passes: tuple[tuple[int, ...], ...]
    names: list[list[str]]
    memory: dict[str, int]
    budget: int
    stored: bool
    disk: int

    @property
    def peak(self) -> int:
        """Bytes of memory at most."""
        return sum(self.memory.values())

    def describe(self) -> list[str]:
        """Lines for a reader."""
        count, networks = len(self.passes), sum(map(len, self.passes))
        lines = [
            f"Plan: {networks} network{'s' * (networks > 1)} in {count} pass{'es' * (count > 1)} over the images.",
            f"Memory: {format_bytes(self.peak)} of {format_bytes(self.budget)} at most ({_parts(self.memory)}).",
        ]
        if count > 1:
            lines += [f"Pass {number}: {', '.join(names)}" for number, names in enumerate(self.names, 1)]
        return lines + ([f"Gram matrices in a file: {format_bytes(self.disk)}."] if self.stored else [])

    def record(self) -> dict[str, Any]:
        """Fit for YAML."""
        return {
            "passes": self.names,
            "budget_bytes": self.budget,
            "disk_bytes": self.disk,
            "memory": self.memory,
            "estimated": {"peak_bytes": self.peak},
        }


def make_plan(networks: Sequence[NetworkMemory], workload: Workload, budget: int) -> Plan:
    """All networks in one pass if they fit together, else in a few passes, one after the other (first fit decreasing).

    With several passes, the Gram matrices wait in a file and are put together at the end.

    Args:
        networks: what each takes.
        workload: what else is in memory.
        budget: bytes of memory that may be in use.

    Raises:
        SpecError: no plan fits; the message gives the least budget that would do.
    """

    def of(group: Sequence[int]) -> dict[str, int]:
        return workload.of_pass([networks[index] for index in group])

    everyone, layers = range(len(networks)), sum(network.layers for network in networks)
    groups, disk, sums = [[*everyone]], 0, workload.sums(layers)
    what, memory = together = "the whole comparison", of(everyone) | sums
    stored = _total(memory) > budget
    if stored:
        groups = _first_fit(everyone, lambda group: _total(of(group)), budget)
        disk = ceil(layers * workload.batch * workload.gram_bytes * workload.examples / workload.processes)
        in_turn = [(networks[group[0]].name, of(group)) for group in groups]
        in_turn.append(("the product of all pairs", {"process": workload.process, **sums}))
        largest = max(in_turn, key=lambda need: _total(need[1]))
        what, memory = min(together, largest, key=lambda need: _total(need[1]))
    if _total(memory) > budget:
        raise SpecError(
            f"--memory must be at least {format_bytes(_total(memory) * 1.01)} for batches of {workload.batch}, but is "
            f"{format_bytes(budget)}: {what} needs that much ({_parts(memory)}). Raise --memory, use a smaller "
            "--batch-size or --image-size, or leave out the largest network."
        )
    names = [[networks[index].name for index in group] for group in groups]
    return Plan(tuple(map(tuple, groups)), names, memory, budget, stored, disk)


def _first_fit(items: Sequence[int], size: Callable[[Sequence[int]], int], most: int) -> list[list[int]]:
    """Groups of items, the largest first, each in the first group with room; an item that is too large is alone."""
    groups: list[list[int]] = []
    for item in sorted(items, key=lambda item: -size([item])):
        room = (group for group in groups if size([*group, item]) <= most)
        group = next(room, None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return sorted(map(sorted, groups))


def _total(memory: dict[str, int]) -> int:
    return sum(memory.values())


def _parts(memory: dict[str, int]) -> str:
    return ", ".join(f"{what} {format_bytes(size)}" for what, size in memory.items() if size >= 1e6)
