"""Measures that need every example at once: they share one store of features, and are evaluated at the end.

Each brings a `Statistic`, which is all its own code: the values for all pairs of layers, on all examples, on all but a
block of them, and on shuffled ones. Errors, control, p-values and curves are then made here, alike for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import LayerFeatures, Matrix
from cka_probe.estimation.estimates import Estimates, Point, p_values
from cka_probe.estimation.gram import Features
from cka_probe.estimation.measure import Setup
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

BLOCKS = 10
"""Of the jackknife: each leaves out a tenth of the examples. An interval is Student's, with 9 degrees of freedom."""

_LEAST_SHARE = 0.6
"""Of the jackknife's variance, what is kept when it is corrected. Where orders above the second take part, the second
alone would take away too much. Chosen in simulation, over populations unlike those of ``benchmarks/intervals.csv`` too.
"""

PERMUTED_EXAMPLES = 2048
"""A permutation test looks at so many of the examples at most: it is valid on any random subset, and costs n² there."""

_LEAST_BLOCK, _LEAST_BLOCKS = 4, 4
"""Fewer blocks, or smaller ones, say nothing of the error: of two or three values some are equal by chance."""

LEAST_EXAMPLES = _LEAST_BLOCK * _LEAST_BLOCKS
"""With fewer there are no standard errors."""

Order = NDArray[np.int64]


class Doubt(NamedTuple):
    """What is doubtful about the values of a layer.

    Attributes:
        message: what it is, and what to do; ``{images}`` stands for the names of the examples.
        examples: that it is about, if it is about some.
    """

    message: str
    examples: Sequence[int] = ()


@dataclass(frozen=True)
class Replicates:
    """The values of a measure for all pairs of layers, again and again.

    Attributes:
        values: (layers, layers) float64, symmetric, on all examples; NaN where it is undefined.
        deleted: (blocks, layers, layers): without the examples of one block.
        shuffled: (orders, layers, layers): with the second layer's examples in another order.
        deleted_pairs: (pairs, layers, layers): without those of two neighbouring blocks, as `neighbouring` pairs them;
            empty for a measure whose errors need no correction.
        doubts: layer -> what is doubtful about its values, where something is.
    """

    values: Matrix
    deleted: Matrix
    shuffled: Matrix
    deleted_pairs: Matrix = field(default_factory=lambda: np.empty(0))
    doubts: Mapping[int, Doubt] = field(default_factory=dict)


class Statistic(Protocol):
    """A measure on all examples of all layers at once."""

    def __call__(self, layers: Sequence[LayerFeatures], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        """The measure, its values without a block, and those in another order.

        Args:
            layers: of the same n examples.
            blocks: of examples to leave out, one block at a time; none where no errors are wanted.
            orders: (n,) permutations of the examples.
        """
        ...

    def check(self, examples: int, widths: Sequence[int]) -> None:
        """Raise where the measure cannot be computed for so many examples of layers so wide.

        Raises:
            FeatureError: it says what is needed.
        """
        ...

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        ...


class Collected:
    """A measure that sees the features of all examples at once. Same protocol as the streaming ones.

    Args:
        setup: the layers, the store of their features, and what is wanted.
        statistic: the measure.
    """

    def __init__(self, setup: Setup, statistic: Statistic) -> None:
        self._store, self._seed, self._requests = setup.store, setup.seed, setup.requests
        self._statistic = statistic

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way. Runs inside the forward hook."""
        self._store.prepare(layer, features)

    def update(self, first: int) -> None:
        """Add the batch, once every layer was prepared.

        Args:
            first: the number of its first example.

        Raises:
            FeatureError: the features of a layer are not finite, or the measure cannot be computed for layers so wide.
        """
        self._store.update(first)
        # How wide the layers are is known: what is impossible is reported now, and not after the last batch. Of
        # networks that run in turn, those of the last one are the last to be known.
        if not first and self._store.has_all_layers:
            self._check(self._store.examples)

    def settle(self, world: World) -> None:
        """Nothing is decided by the first batch."""

    def merge(self, world: World) -> None:
        """Move the features that all processes have to rank 0."""
        self._store.merge(world)

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs to go on from here; the features that came since the last time are written to a folder."""
        return self._store.state(folder)

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Go on from what `state` gave and wrote."""
        self._store.load(state, folder)

    def compute(self) -> Estimates:
        """The estimates over all examples so far."""
        layers = self._store.layers()
        n = self._store.filled
        self._check(n)
        rng = np.random.default_rng(self._seed)
        blocks = jackknife_blocks(n)
        found = self._statistic(layers, blocks, [rng.permutation(n)])
        details = {"blocks": len(blocks), **self._statistic.details()}
        if found.doubts:
            details["doubts"] = dict(found.doubts)
        p_value = p_value_max = None
        if self._requests.permutations:
            few = min(n, PERMUTED_EXAMPLES)
            orders = [rng.permutation(few) for _ in range(self._requests.permutations)]
            tested = self._statistic([features.first(few) for features in layers], (), orders)
            p_value, p_value_max = p_values(tested.values, tested.shuffled, self._requests.groups)
            details |= {"permutations": len(orders), "permuted_examples": few}
        points = (self._point(layers, size) for size in self._requests.curve)
        return Estimates(
            torch.from_numpy(found.values), torch.from_numpy(jackknife_error(found)),
            torch.from_numpy(found.shuffled[0]), details, p_value, p_value_max,
            [point for point in points if point is not None],
        )  # fmt: skip

    def _check(self, examples: int) -> None:
        """Raise where the fewest examples that are looked at are too few."""
        fewest = examples - _most_left_out(jackknife_blocks(examples))
        if self._requests.permutations:
            fewest = min(fewest, PERMUTED_EXAMPLES)
        self._statistic.check(fewest, self._store.widths())

    def _point(self, layers: Sequence[LayerFeatures], size: int) -> Point | None:
        """The measure on the first ``size`` examples; None where they are too few for it."""
        blocks = jackknife_blocks(size)
        try:
            self._statistic.check(size - _most_left_out(blocks), [features.values.shape[1] for features in layers])
            found = self._statistic([features.first(size) for features in layers], blocks, ())
        except FeatureError:
            return None
        return Point(size, found.values, jackknife_error(found))


@dataclass(frozen=True)
class Pairwise:
    """A `Statistic` that reduces each layer to a state once, and compares two states.

    Its errors are corrected for their second order (see `jackknife_error`).

    Attributes:
        reduce: a layer that is not constant, and runs of examples to leave out -> its state.
        compare: two states, those runs, and orders -> the values without each of the runs, and those with the second
            state's examples in each of the orders; symmetric.
        settings: fit for YAML.
        enough: raises where so many examples of layers so wide are too few.
        doubt: of a state, what is doubtful about it, or None.
    """

    reduce: Callable[[LayerFeatures, Sequence[slice]], Any]
    compare: Callable[[Any, Any, Sequence[slice], Sequence[Order]], tuple[Sequence[float], Sequence[float]]]
    settings: dict[str, Any]
    enough: Callable[[int, Sequence[int]], None] = lambda examples, widths: None
    doubt: Callable[[Any], Doubt | None] = lambda state: None

    def __call__(self, layers: Sequence[LayerFeatures], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        count = len(layers)
        left_out = [slice(0, 0), *blocks, *neighbouring(blocks)]
        states = [None if features.is_constant() else self.reduce(features, left_out) for features in layers]
        kept = np.full((len(left_out), count, count), np.nan)
        shuffled = np.full((len(orders), count, count), np.nan)
        known = [index for index, state in enumerate(states) if state is not None]
        for i in known:
            for j in (j for j in known if i <= j):
                found = self.compare(states[i], states[j], left_out, orders)
                for part, values in zip((kept, shuffled), found, strict=True):
                    part[:, i, j] = part[:, j, i] = values
        end = 1 + len(blocks)
        found_doubts = {index: self.doubt(states[index]) for index in known}
        doubts = {index: doubt for index, doubt in found_doubts.items() if doubt is not None}
        return Replicates(kept[0], kept[1:end], shuffled, kept[end:], doubts)

    def check(self, examples: int, widths: Sequence[int]) -> None:
        """As `Statistic` has it."""
        self.enough(examples, widths)

    def value(self, x: LayerFeatures, y: LayerFeatures) -> float:
        """The measure of two layers that are not constant, on all examples."""
        nothing = [slice(0, 0)]
        states = self.reduce(x, nothing), self.reduce(y, nothing)
        for name, doubt in zip("xy", map(self.doubt, states), strict=True):
            if doubt is not None:
                examples = f"example {', '.join(map(str, doubt.examples[:3]))}" + ("…" if doubt.examples[3:] else "")
                logger.warning("In %s %s.", name, doubt.message.format(images=examples))
        (found,), _ = self.compare(*states, nothing, ())
        return found

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        return self.settings


def jackknife_blocks(examples: int) -> list[slice]:
    """So many examples in `BLOCKS` runs of almost equal length; fewer where they are few, none below 16."""
    count = min(BLOCKS, examples // _LEAST_BLOCK)
    if count < _LEAST_BLOCKS:
        return []
    ends = np.linspace(0, examples, count + 1).round().astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def neighbouring(blocks: Sequence[slice]) -> list[slice]:
    """The first and the second block as one run, the third and the fourth, ...; none of fewer than four blocks."""
    if len(blocks) < 4:
        return []
    return [slice(first.start, second.stop) for first, second in zip(blocks[::2], blocks[1::2], strict=False)]


def _most_left_out(blocks: Sequence[slice]) -> int:
    return max((run.stop - run.start for run in (*blocks, *neighbouring(blocks))), default=0)


def jackknife_error(found: Replicates) -> Matrix:
    """The standard error from values that each leave a block out, corrected where there are values without two.

    The blocks are independent draws, and no example is used twice, as a bootstrap would: an example beside its double
    has a neighbour at distance 0, which no measure of similarity survives.

    Of g blocks, J = (g - 1)/g · Σ (θ_b - mean)² is the variance where θ is nearly a sum over the blocks. Its part of
    second order, β_bc of two blocks b and c where θ = … + Σ β_bc / g², is counted 2 g² (g - 2)/(g - 1)³ times, 2.2 for
    g = 10 (Efron & Stein 1981). That is much for canonical correlations, which in noise are singular values that repel
    each other, and for common neighbours, which are counts of pairs. Their Q_bc = g θ - (g - 1)(θ_b + θ_c) +
    (g - 2) θ_bc holds nothing of first order; from the mean of its squares follows what J has too much, and that is
    taken away. Where higher orders take part it would be more than that: at least `_LEAST_SHARE` of J stays.

    Values that are the same without each block say nothing of their error either, such as the 0 of two layers without
    any common neighbours, unless they are what the layer gives with itself.

    Returns:
        (layers, layers), NaN where there are fewer than two blocks, or no two values differ.
    """
    deleted, count = found.deleted, len(found.deleted)
    if count < 2:
        return np.full(found.values.shape, np.nan)
    variance = (count - 1) / count * np.square(deleted - deleted.mean(0)).sum(0)
    if len(found.deleted_pairs):
        pairs = range(0, count - 1, 2)
        either = np.stack([deleted[first] + deleted[first + 1] for first in pairs])
        second_order = count * found.values - (count - 1) * either + (count - 2) * found.deleted_pairs
        excess = _excess(count) * np.square(second_order).mean(0)
        variance = np.maximum(variance - excess, _LEAST_SHARE * variance)
    unmoved = (variance == 0) & (found.values != found.values.diagonal()[:, None])
    return np.where(unmoved, np.nan, np.sqrt(variance))


def _excess(g: int) -> float:
    """What J has too much of a part of second order, over the mean of Q_bc²: both are sums of squares of all β_bc."""
    counted, true = (g - 2) / (g * (g - 1) ** 2), (g - 1) / (2 * g**3)
    others = 2 * (g - 2) / (g - 1) ** 2 + 2 * (g - 3) / ((g - 1) ** 2 * (g - 2))  # β that share one block, or none
    return (counted - true) * g**2 / (1 + others)
