"""The plan of a comparison: which networks run together within a budget of memory, and what it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.probing.in_turn.cost import ImageCost, NetworkCost, Work, told_bytes

_READ_BYTES_PER_SECOND = 1e9
"""At which weights come back from a file: it was just written, and mostly lies in the system's memory."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, and the memory that it takes: bytes by what they are for.

    Attributes:
        networks: the numbers of those that run; none in the last stage, which puts the Gram matrices together.
        memory: what for -> bytes, the process itself among them.
    """

    networks: tuple[int, ...]
    memory: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        stages: one after the other. All networks in one, or several and the putting together.
        costs: of the networks.
        work: what is measured.
        budget: bytes of memory.
        disk: bytes of Gram matrices in a file.
        seconds: that it should take.
    """

    stages: tuple[Stage, ...]
    costs: tuple[NetworkCost, ...]
    work: Work
    budget: int
    disk: int = 0
    seconds: float = float("nan")

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The numbers of the networks that run together, pass by pass."""
        return [stage.networks for stage in self.stages if stage.networks]

    @property
    def waits(self) -> bool:
        """Whether Gram matrices wait in a file for the last stage."""
        return not self.stages[-1].networks

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    def told(self) -> list[str]:
        """Lines for a reader."""
        passes, examples = len(self.groups), self.work.examples
        kinds = ", ".join(f"{what} {told_bytes(size)}" for what, size in self._largest().memory.items() if size >= 5e6)
        often = "" if passes == 1 else f"; each image is read {passes} times"
        networks = f"{len(self.costs)} network{'s' if len(self.costs) > 1 else ''}"
        lines = [
            f"Plan: {networks}, {self.work.layers} layers and {examples} images in {passes} "
            f"pass{'es' if passes > 1 else ''}, in about {_told_seconds(self.seconds)}{often}.",
            f"Memory: {told_bytes(self.peak)} of {told_bytes(self.budget)} at most ({kinds}).",
        ]
        if passes > 1:
            lines += [
                f"Pass {number}: {', '.join(self.costs[index].name for index in group)}"
                for number, group in enumerate(self.groups, 1)
            ]
        if self.waits:
            lines.append(f"Gram matrices that wait: {told_bytes(self.disk)} in a file.")
        return lines

    def record(self) -> dict[str, Any]:
        """Fit for YAML."""
        return {
            "passes": [[self.costs[index].name for index in group] for group in self.groups],
            "budget_bytes": self.budget,
            "forward_flops": sum(cost.flops for cost in self.costs) * self.work.examples,
            "disk_bytes": self.disk,
            "memory": dict(self._largest().memory),
            "estimated": {"seconds": round(self.seconds, 2), "peak_bytes": self.peak},
        }

    def _largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)


def make_plan(costs: Sequence[NetworkCost], work: Work, images: ImageCost, *, resident: int, budget: int) -> Plan:
    """All networks in one pass where they fit together, else in few groups that each do, one after the other.

    In groups, the Gram matrices of a pass wait in a file, and are put together at the end.

    Args:
        costs: of the networks.
        work: what is measured.
        images: what it takes to have them.
        resident: bytes that are in use while no network runs.
        budget: bytes that may be in use.

    Raises:
        SpecError: no plan fits; the message says the least budget that one would.
    """
    together = _together(costs, work, images, range(len(costs)), resident)
    if together.peak <= budget:
        return Plan((together,), tuple(costs), work, budget)
    alone = [_in_turn(costs, work, images, [index], resident) for index in range(len(costs))]
    last = Stage((), {"the process": resident, **work.sums})
    least = min(together, max((*alone, last), key=lambda stage: stage.peak), key=lambda stage: stage.peak)
    if least.peak > budget:
        raise SpecError(_too_little(least, costs, work, budget))
    groups: list[list[int]] = []
    # The largest first, each into the first group that has room: few groups, if not always the fewest.
    for index in sorted(range(len(costs)), key=lambda index: (-alone[index].peak, index)):
        for group in groups:
            if _in_turn(costs, work, images, [*group, index], resident).peak <= budget:
                group.append(index)
                break
        else:
            groups.append([index])
    stages = [_in_turn(costs, work, images, sorted(group), resident) for group in groups]
    return Plan((*sorted(stages, key=lambda stage: stage.networks), last), tuple(costs), work, budget, work.kept_bytes)


def timed(plan: Plan, images: ImageCost, together: float) -> Plan:
    """The plan with the seconds it should take.

    Args:
        plan: of networks that were timed.
        images: what it takes to have them.
        together: seconds a batch to put the Gram matrices of all layers together.
    """
    batches, seconds = plan.work.batches, 0.0
    for group in plan.groups:
        costs = [plan.costs[index] for index in group]
        computing = sum(cost.seconds for cost in costs) + (0 if plan.waits else together)
        looks = frozenset[int]().union(*(cost.looks for cost in costs))
        seconds += images.together_with(computing, looks, plan.work.batch) * batches
        seconds += sum(cost.weights for cost in costs) / _READ_BYTES_PER_SECOND
    if plan.waits:
        seconds += together * batches
    return replace(plan, seconds=seconds)


def _together(
    costs: Sequence[NetworkCost], work: Work, images: ImageCost, numbers: Sequence[int], resident: int
) -> Stage:
    """All networks at once: what a batch leaves behind waits for the last of them, and is then put together."""
    alone = _in_turn(costs, work, images, numbers, resident)
    return replace(alone, memory={**alone.memory, **work.sums})


def _in_turn(
    costs: Sequence[NetworkCost], work: Work, images: ImageCost, numbers: Sequence[int], resident: int
) -> Stage:
    some = [costs[index] for index in numbers]
    looks = frozenset[int]().union(*(cost.looks for cost in some))
    memory = {
        "the process": resident,
        "weights": sum(cost.weights for cost in some),
        "activations": max((cost.working for cost in some), default=0),
        "images": images.held(looks, work.batch),
        "Gram matrices": work.gram_bytes * sum(len(cost.widths) for cost in some),
    }
    return Stage(tuple(numbers), memory)


def _too_little(least: Stage, costs: Sequence[NetworkCost], work: Work, budget: int) -> str:
    parts = ", ".join(f"{what} {told_bytes(size)}" for what, size in least.memory.items() if size >= 1e6)
    what = "the sums over all pairs of layers take"
    if least.networks:
        what = " and ".join(repr(costs[index].name) for index in least.networks[:2])
        what += f" and {len(least.networks) - 2} more" if len(least.networks) > 2 else ""
        what += " takes" if len(least.networks) == 1 else " take"
    return (
        f"--memory must be at least {told_bytes(least.peak * 1.01)} for batches of {work.batch}, but is "
        f"{told_bytes(budget)}: that is what {what} ({parts}). Use a smaller --batch-size or --image-size, or "
        "leave the largest network out."
    )


def _told_seconds(seconds: float) -> str:
    if not seconds < 90:
        return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"
