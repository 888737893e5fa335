"""The plan of a comparison with --memory: which networks run together, and how much memory that takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from numbers import Integral
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import shown

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_MOST_BYTES = 10**18


def parse_bytes(size: str | int) -> int:
    """A number of bytes: ``"8GB"`` (10⁹), ``"6GiB"`` (2³⁰), ``"500MB"``; a whole number is one already.

    Raises:
        SpecError: it is none of these.

    >>> parse_bytes("1.5 GB"), parse_bytes("2GiB")
    (1500000000, 2147483648)
    """
    if isinstance(size, Integral) and not isinstance(size, bool):
        count = int(size)
    else:
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]I?B)", str(size).strip().upper(), re.ASCII)
        count = int(float(found[1]) * _UNITS[found[2]]) if found is not None else 0
    if not 0 < count <= _MOST_BYTES:
        raise SpecError(
            f"--memory must be a size with a unit, such as 8GB, 500MB or 6GiB, above 0 and at most 1,000,000 TB, but "
            f"is {shown(size)}."
        )
    return count


def format_bytes(size: float) -> str:
    """A number of bytes for a reader: ``1.53 GB``."""
    for unit in ("TB", "GB", "MB"):
        if size >= 0.9995 * _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{max(size, 0) / 1e3:.0f} kB"


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

    def gram_file(self, layers: int) -> int:
        """Bytes of the Gram matrices of all batches."""
        return ceil(layers * self.batch * self.gram_bytes * self.examples / self.processes)

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
        networks: all of them.
        groups: for each pass, the numbers of the networks that run in it.
        memory: of the part of the run that takes most: what for -> bytes.
        budget: bytes of memory.
        workload: what else is in memory.
        stored: whether Gram matrices wait in a file and are put together at the end.
    """

    networks: tuple[NetworkMemory, ...]
    groups: tuple[tuple[int, ...], ...]
    memory: dict[str, int]
    budget: int
    workload: Workload
    stored: bool

    @property
    def peak(self) -> int:
        """Bytes of memory at most."""
        return sum(self.memory.values())

    @property
    def layers(self) -> int:
        """Of all networks."""
        return sum(network.layers for network in self.networks)

    @property
    def disk(self) -> int:
        """Bytes of Gram matrices in a file."""
        return self.workload.gram_file(self.layers) if self.stored else 0

    def describe(self) -> list[str]:
        """Lines for a reader."""
        passes, networks = len(self.groups), len(self.networks)
        lines = [
            f"Plan: {networks} network{'s' * (networks > 1)}, {self.layers} layers and {self.workload.examples} images "
            f"in {passes} pass{'es' * (passes > 1)}{f'; each image is read {passes} times' if passes > 1 else ''}.",
            f"Memory: {format_bytes(self.peak)} of {format_bytes(self.budget)} at most ({_parts(self.memory)}).",
        ]
        if passes > 1:
            lines += [f"Pass {number}: {', '.join(names)}" for number, names in enumerate(self._names(), 1)]
        if self.stored:
            lines.append(f"Gram matrices in a file: {format_bytes(self.disk)}.")
        return lines

    def record(self) -> dict[str, Any]:
        """Fit for YAML."""
        return {
            "passes": self._names(),
            "budget_bytes": self.budget,
            "disk_bytes": self.disk,
            "memory": dict(self.memory),
            "estimated": {"peak_bytes": self.peak},
        }

    def _names(self) -> list[list[str]]:
        return [[self.networks[index].name for index in group] for group in self.groups]


def make_plan(networks: Sequence[NetworkMemory], workload: Workload, budget: int) -> Plan:
    """All networks in one pass if they fit together, else in a few groups, one after the other (first fit decreasing).

    With several groups, the Gram matrices of each pass wait in a file and are put together at the end.

    Args:
        networks: what each takes.
        workload: what else is in memory.
        budget: bytes of memory that may be in use.

    Raises:
        SpecError: no plan fits; the message gives the least budget that would do.
    """
    sums = workload.sums(sum(network.layers for network in networks))
    together = {**workload.of_pass(networks), **sums}
    if sum(together.values()) <= budget:
        return Plan(tuple(networks), (tuple(range(len(networks))),), together, budget, workload, stored=False)
    last = {"process": workload.process, **sums}
    alone = [workload.of_pass([network]) for network in networks]
    needs = [*zip([network.name for network in networks], alone, strict=True), ("the product of all pairs", last)]
    largest = max(needs, key=lambda need: _total(need[1]))
    what, least = min(("the whole comparison", together), largest, key=lambda need: _total(need[1]))
    if _total(least) > budget:
        raise SpecError(
            f"--memory must be at least {format_bytes(_total(least) * 1.01)} for batches of {workload.batch}, but is "
            f"{format_bytes(budget)}: {what} needs that much ({_parts(least)}). Raise --memory, use a smaller "
            "--batch-size or --image-size, or leave out the largest network."
        )
    groups: list[list[int]] = []
    for index in sorted(range(len(networks)), key=lambda index: (-_total(alone[index]), index)):
        for group in groups:
            if _total(workload.of_pass([networks[one] for one in (*group, index)])) <= budget:
                group.append(index)
                break
        else:
            groups.append([index])
    passes = [workload.of_pass([networks[index] for index in group]) for group in groups]
    memory = max((last, *passes), key=_total)
    in_order = tuple(sorted(tuple(sorted(group)) for group in groups))
    return Plan(tuple(networks), in_order, memory, budget, workload, stored=True)


def _total(memory: dict[str, int]) -> int:
    return sum(memory.values())


def _parts(memory: dict[str, int]) -> str:
    return ", ".join(f"{what} {format_bytes(size)}" for what, size in memory.items() if size >= 1e6)
