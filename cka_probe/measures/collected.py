"""Measures that need every example at once: they share one store of features, and are evaluated at the end.

Each brings a `Statistic`, which is all its own code: the values for all pairs of layers, on all examples, on all but a
block of them, and on shuffled ones. Errors, control, p-values and curves are then made here, alike for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.errors import FeatureError
from cka_probe.features import Features
from cka_probe.measures.arrays import Matrix, is_constant
from cka_probe.measures.estimates import VALUES_ONLY, Asked, Estimates, Point, p_values
from cka_probe.measures.storage import FeatureStore
from cka_probe.world import World

BLOCKS = 10
"""Of the jackknife: each leaves out a tenth of the examples. An interval is Student's, with 9 degrees of freedom."""

PERMUTED_EXAMPLES = 2048
"""A permutation test looks at so many of the examples at most: it is valid on any random subset, and costs n² there."""

_LEAST_BLOCK = 4

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Replicates:
    """The values of a measure for all pairs of layers, again and again.

    Attributes:
        values: (layers, layers) float64, symmetric, on all examples; NaN where it is undefined.
        deleted: (blocks, layers, layers): without the examples of one block.
        shuffled: (orders, layers, layers): with the second layer's examples in another order.
    """

    values: Matrix
    deleted: Matrix
    shuffled: Matrix


class Statistic(Protocol):
    """A measure on all examples of all layers at once."""

    def __call__(self, layers: Sequence[NDArray[Any]], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        """The measure, its values without a block, and those in another order.

        Args:
            layers: (n, d) features each, of the same n examples.
            blocks: of examples to leave out, one block at a time; none where no errors are wanted.
            orders: (n,) permutations of the examples.
        """
        ...

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        ...


class Collected:
    """A measure that sees the features of all examples at once. Same protocol as the streaming ones.

    Args:
        store: of the features, shared by all collected measures of a run.
        statistic: the measure.
        seed: of the permutations.
        asked: what is wanted beside the values.
    """

    def __init__(self, store: FeatureStore, statistic: Statistic, *, seed: int, asked: Asked = VALUES_ONLY) -> None:
        self._store = store
        self._statistic = statistic
        self._seed = seed
        self._asked = asked

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way. Runs inside the forward hook."""
        self._store.prepare(layer, features)

    def update(self, first: int) -> None:
        """Add the batch, once every layer was prepared.

        Args:
            first: the number of its first example.

        Raises:
            FeatureError: the features of a layer are not finite.
        """
        self._store.update(first)

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
        rng = np.random.default_rng(self._seed)
        blocks = jackknife_blocks(n)
        found = self._statistic(layers, blocks, [rng.permutation(n)])
        details = {"blocks": len(blocks), **self._statistic.details()}
        p_value = p_value_max = None
        if self._asked.permutations:
            few = min(n, PERMUTED_EXAMPLES)
            orders = [rng.permutation(few) for _ in range(self._asked.permutations)]
            tested = self._statistic([features[:few] for features in layers], (), orders)
            p_value, p_value_max = p_values(tested.values, tested.shuffled, self._asked.groups)
            details |= {"permutations": len(orders), "permuted_examples": few}
        points = (self._point(layers, size) for size in self._asked.curve)
        return Estimates(
            torch.from_numpy(found.values), torch.from_numpy(jackknife_error(found.deleted)),
            torch.from_numpy(found.shuffled[0]), details, p_value, p_value_max,
            [point for point in points if point is not None],
        )  # fmt: skip

    def _point(self, layers: Sequence[NDArray[Any]], size: int) -> Point | None:
        """The measure on the first ``size`` examples; None where they are too few for it."""
        try:
            found = self._statistic([features[:size] for features in layers], jackknife_blocks(size), ())
        except FeatureError:
            return None
        return Point(size, found.values, jackknife_error(found.deleted))


def collected(statistic: Callable[..., Statistic]) -> Callable[..., Collected]:
    """A factory of measures, as the table of measures has them, from one of statistics."""

    def start(
        labels: Sequence[str], *, store: FeatureStore, seed: int, asked: Asked = VALUES_ONLY, **options: Any
    ) -> Collected:
        return Collected(store, statistic(scratch=store.scratch, **options), seed=seed, asked=asked)

    return start


@dataclass(frozen=True)
class Pairwise:
    """A `Statistic` that reduces each layer to a state once, and compares two states.

    Attributes:
        reduce: (n, d) features -> the state of a layer that is not constant.
        compare: of two states, symmetric.
        shuffle: the state with the examples in another order.
        settings: fit for YAML.
        without: the state without the examples of a block, where it is not simply that of the other examples.
        check: raises where so many examples (after a block is left out) are too few for the features.
    """

    reduce: Callable[[NDArray[Any]], Any]
    compare: Callable[[Any, Any], float]
    shuffle: Callable[[Any, Order], Any]
    settings: dict[str, Any]
    without: Callable[[Any, slice], Any] | None = None
    check: Callable[[int, Sequence[NDArray[Any]]], None] = lambda examples, layers: None

    def __call__(self, layers: Sequence[NDArray[Any]], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        n = len(layers[0])
        self.check(n - max((block.stop - block.start for block in blocks), default=0), layers)
        states = self._states(layers)
        values = self._matrix(states, states)
        shuffled = []
        for order in orders:
            others = [None if state is None else self.shuffle(state, order) for state in states]
            shuffled.append(self._matrix(states, others))
        deleted = []
        for block in blocks:
            if self.without is None:
                kept = self._states([np.delete(features, block, axis=0) for features in layers])
            else:
                kept = [None if state is None else self.without(state, block) for state in states]
            deleted.append(self._matrix(kept, kept))
        return Replicates(values, _stacked(deleted, values), _stacked(shuffled, values))

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        return self.settings

    def _states(self, layers: Sequence[NDArray[Any]]) -> list[Any]:
        return [None if is_constant(features) else self.reduce(features) for features in layers]

    def _matrix(self, states: Sequence[Any], others: Sequence[Any]) -> Matrix:
        """All pairs, (layers, layers); NaN in the rows and columns of layers without a state."""
        count = len(states)
        matrix = np.full((count, count), np.nan)
        known = [index for index, state in enumerate(states) if state is not None]
        for i in known:
            for j in (j for j in known if i <= j):
                matrix[i, j] = matrix[j, i] = self.compare(states[i], others[j])
        return matrix


def jackknife_blocks(examples: int) -> list[slice]:
    """So many examples in `BLOCKS` runs of almost equal length; fewer where they are few, none below 8."""
    count = min(BLOCKS, examples // _LEAST_BLOCK)
    if count < 2:
        return []
    ends = np.linspace(0, examples, count + 1).round().astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def jackknife_error(deleted: Matrix) -> Matrix:
    """The standard error from values that each leave a block out: √((g - 1)/g · Σ (θ_b - mean)²).

    The blocks are independent draws, and no example is used twice, as a bootstrap would: an example beside its double
    has a neighbour at distance 0, which no measure of similarity survives.

    Args:
        deleted: (g, ...) values.

    Returns:
        (...), NaN where there are fewer than two blocks.
    """
    count = len(deleted)
    if count < 2:
        return np.full(deleted.shape[1:], np.nan)
    around = deleted - deleted.mean(0)
    return np.asarray(np.sqrt((count - 1) / count * np.square(around).sum(0)))


def _stacked(matrices: Sequence[Matrix], like: Matrix) -> Matrix:
    return np.stack(matrices) if matrices else np.empty((0, *like.shape))
