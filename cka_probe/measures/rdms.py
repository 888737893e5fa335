"""Representational dissimilarity matrices (RDMs) of many layers, and their correlations.

Dissimilarities that differ by no more than the round-off of their computation are ties. Otherwise the ranks of equal
ones, such as those of a category model, would be noise.

10,000 examples have 50 million dissimilarities a layer. Each is kept as the number of its bin. Up to 512 examples a tie
has a bin of its own, and all is exact. Beyond, there are at most 65,536 bins (16 bits a pair), equally full for ranks
and equally wide for values, which change Spearman's and Pearson's correlations by less than 1e-6; no bin parts a tie.
A layer is sorted once: its ranks among fewer examples follow from the counts of its bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cka_probe.estimation.arrays import LayerFeatures, Matrix
from cka_probe.estimation.collected import Doubt, Order, Replicates
from cka_probe.estimation.feature_store import Scratch

Rdm = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "kendall", "pearson"]

EXACT_EXAMPLES = 512
"""Up to so many, each tie has a bin of its own. Kendall's τ, of each pair of layers by itself, takes no more."""

BINS = 1 << 16
_ROUND_OFF = 8 * np.finfo(np.float64).eps
"""Of a dissimilarity, relative to |x|² + |y|²: four times what was seen of 10 to 500,000 features."""

_EXACT = 1 << 27
"""Up to so many products, Euclidean distances are summed from differences, so that close examples lose no digits."""

_UNDEFINED = (
    "the features of {images} have no direction (all are equal, or 0), so that their dissimilarities are not defined. "
    "Leave the images out, or use euclidean ones"
)

_LEAST_SPREAD = 1e-6
"""Of the dissimilarities, relative: below it, what is kept in float32 does not distinguish them."""

_CHUNK = 1 << 17  # of dissimilarities a layer at a time


def condensed_rdm(x: NDArray[Any], rdm: Rdm) -> Matrix:
    """The dissimilarities of all pairs of examples, row after row of the lower triangle.

    Args:
        x: (n, d) features.
        rdm: ``"correlation"``, 1 - Pearson's r over the features; ``"cosine"``, 1 - cosine; ``"euclidean"``.

    Returns:
        (n (n - 1) / 2,) float64, those of a tie equal; NaN for an example whose features have no direction (all equal,
        or all 0).
    """
    prepared = _Prepared.of(x, rdm)
    values = np.concatenate([*prepared.blocks()])
    if np.isnan(values).any():
        return values
    ordered = np.sort(values)
    starts = tie_starts(ordered, *prepared.tolerance)
    return prepared.dissimilarities(_means(ordered, starts))[np.searchsorted(ordered[starts], values, "right") - 1]


def tie_starts(ordered: Matrix, absolute: float, relative: float = 0.0) -> NDArray[np.int64]:
    """Where ties begin in ascending values, (ties,): a tie is no wider than absolute + relative × its first value.

    A value that is close to the last of a tie, but not to its first, begins a new one, so that ties do not grow
    without end where values lie close together.
    """
    gaps = np.diff(ordered) > absolute + relative * ordered[:-1]
    starts = np.concatenate([[0], np.flatnonzero(gaps) + 1])
    last = ordered[np.append(starts[1:], len(ordered)) - 1]
    wide = np.flatnonzero(last > ordered[starts] + absolute + relative * ordered[starts])
    more = []
    for run in wide:
        start, end = starts[run], starts[run + 1] if run + 1 < len(starts) else len(ordered)
        while True:
            reach = ordered[start] + absolute + relative * ordered[start]
            start += np.searchsorted(ordered[start:end], reach, "right")
            if start >= end:
                break
            more.append(start)
    return np.sort(np.concatenate([starts, more]).astype(np.int64)) if more else starts


def permuted_pairs(order: Order) -> Order:
    """Where the pairs of examples in another order lie in a condensed RDM, (n (n - 1) / 2,)."""
    rows = ((np.maximum(row, order[:i]), np.minimum(row, order[:i])) for i, row in enumerate(order))
    return np.concatenate([larger * (larger - 1) // 2 + smaller for larger, smaller in rows])


@dataclass(frozen=True)
class RdmStatistic:
    """A `cka_probe.estimation.collected.Statistic`: the correlation of the RDMs of all pairs of layers.

    Attributes:
        rdm: which dissimilarity.
        comparison: which correlation.
        scratch: where the bins lie.
    """

    rdm: Rdm
    comparison: Comparison
    scratch: Scratch

    def __call__(self, layers: Sequence[LayerFeatures], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        count, n = len(layers), len(layers[0].values)
        binned = _Binned(layers, self)
        lower = np.tri(n, n, -1, dtype=bool)

        def without(block: slice) -> NDArray[np.bool_]:
            kept = np.ones(n, dtype=bool)
            kept[block] = False
            return np.asarray(np.logical_and.outer(kept, kept)[lower])

        compared = binned.kendall if self.comparison == "kendall" else binned.pearson
        deleted: Any = [compared(kept=without(block)) for block in blocks]
        shuffled: Any
        if len(orders) > 1 and self.comparison != "kendall":
            shuffled = binned.permuted(orders)
        else:
            shuffled = [compared(moved=permuted_pairs(order)) for order in orders]
        shape = -1, count, count
        deleted, shuffled = np.array(deleted).reshape(shape), np.array(shuffled).reshape(shape)
        return Replicates(compared(), deleted, shuffled, doubts=binned.doubts)

    def check(self, examples: int, widths: Sequence[int]) -> None:
        """Any number of features will do."""

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        return {"rdm": self.rdm, "rdm_comparison": self.comparison}


class _Binned:
    """The RDMs of all layers, each dissimilarity as the number of its bin.

    Attributes:
        bins: (layers, pairs), pairs as in `condensed_rdm`; those of layers without an RDM are not filled in.
        means: layer -> the mean dissimilarity of each bin; of the layers with an RDM.
        doubts: layer -> that some of its examples have features without a direction.
    """

    def __init__(self, layers: Sequence[LayerFeatures], statistic: RdmStatistic) -> None:
        n = len(layers[0].values)
        self._ranks = statistic.comparison != "pearson"
        self._scratch = statistic.scratch
        self._most = n * n if n <= EXACT_EXAMPLES else BINS
        shape = len(layers), n * (n - 1) // 2
        self.bins = self._scratch.empty(shape, np.uint32 if n <= EXACT_EXAMPLES else np.uint16)
        self.means: dict[int, Matrix] = {}
        self.doubts: dict[int, Doubt] = {}
        for index, features in enumerate(layers):
            if features.is_constant():
                continue
            prepared = _Prepared.of(features.values, statistic.rdm)
            if len(prepared.without_direction):
                self.doubts[index] = Doubt(_UNDEFINED, prepared.without_direction.tolist())
            else:
                self._fill(index, prepared)

    def _fill(self, index: int, prepared: _Prepared) -> None:
        """Sort a layer into bins, unless its dissimilarities are all the same."""
        values = self._scratch.empty(self.bins.shape[1:], np.float64)
        start = 0
        for block in prepared.blocks():
            values[start : start + len(block)] = block
            start += len(block)
        ordered = np.sort(values)
        starts = tie_starts(ordered, *prepared.tolerance)
        if not ordered[-1] - ordered[0] > _LEAST_SPREAD * abs(ordered[-1]) or len(starts) == 1:
            return
        if len(starts) > self._most:
            starts = _fewer(ordered, starts)
        edges = ordered[starts]
        for where in _chunks(len(values)):
            self.bins[index, where] = np.searchsorted(edges, values[where], "right") - 1
        self.means[index] = _means(prepared.dissimilarities(ordered), starts)

    def _standardized(self, index: int, kept: NDArray[np.bool_] | None = None) -> Matrix:
        """What each bin stands for, (bins,): its mean or its average rank, standardized over the pairs that are kept.

        The values of the pairs have a mean of 0 and a sum of squares of 1.
        """
        means = self.means[index]
        bins = self.bins[index] if kept is None else self.bins[index, kept]
        counts = np.bincount(bins, minlength=len(means))
        values = np.cumsum(counts) - (counts - 1) / 2 if self._ranks else means
        centered = values - np.average(values, weights=counts)
        return np.asarray(centered / (np.sqrt(counts @ np.square(centered)) or np.inf))

    def pearson(self, kept: NDArray[np.bool_] | None = None, moved: Order | None = None) -> Matrix:
        """Pearson's r of the values, or of their ranks, for all pairs of layers, (layers, layers).

        Args:
            kept: (pairs,) which pairs of examples count; all where None.
            moved: (pairs,) in which order the second layer has them; as they are where None.
        """
        tables = {index: self._standardized(index, kept) for index in self.means}
        sums = np.zeros((len(tables), len(tables)))
        for where in _chunks(self.bins.shape[1]):
            if kept is not None and not kept[where].any():
                continue
            first = second = self._values(tables, where)
            if kept is not None:
                first *= kept[where]
            if moved is not None:
                second = self._values(tables, moved[where])
            sums += first @ second.T
        return self._with_undefined(sums)

    def permuted(self, orders: Sequence[Order]) -> list[Matrix]:
        """Pearson's r with the second layer's examples in each of the orders, of so few that all values fit in memory.

        The values of all layers lie side by side, so that a pair that moves takes one step through the memory.
        """
        tables = {index: self._standardized(index) for index in self.means}
        values = np.ascontiguousarray(self._values(tables, slice(None)).T)
        found = []
        for order in orders:
            moved = permuted_pairs(order)
            chunks = (values[where].T @ values.take(moved[where], axis=0) for where in _chunks(len(values)))
            found.append(self._with_undefined(sum(chunks)))
        return found

    def _values(self, tables: Mapping[int, Matrix], pairs: slice | Order) -> Matrix:
        """(layers with an RDM, pairs)."""
        found = np.empty((len(tables), len(self.bins[0, pairs])))
        for row, (index, table) in zip(found, tables.items(), strict=True):
            row[:] = table[self.bins[index, pairs]]
        return found

    def _with_undefined(self, values: Any) -> Matrix:
        found = np.full((len(self.bins), len(self.bins)), np.nan)
        known = list(self.means)
        found[np.ix_(known, known)] = values
        return found

    def kendall(self, kept: NDArray[np.bool_] | slice = slice(None), moved: Order | slice = slice(None)) -> Matrix:
        """Kendall's τ-b, as `pearson`."""
        from scipy.stats import kendalltau

        found = np.full((len(self.bins),) * 2, np.nan)
        for i in self.means:
            for j in (j for j in self.means if i <= j):
                first, second = self.bins[i, kept], self.bins[j, moved][kept]
                found[i, j] = found[j, i] = kendalltau(first, second).statistic
        return found


def _chunks(pairs: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, pairs, _CHUNK))


def _fewer(ordered: Matrix, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ties at which at most 65,536 bins start: half of them equally full, half equally wide."""
    low, high = ordered[0], ordered[-1]
    by_rank = starts * (BINS // 2 - 1) // len(ordered)
    by_value = ((ordered[starts] - low) / (high - low) * (BINS // 2 - 1)).astype(np.int64)
    return np.asarray(starts[np.diff(by_rank + by_value, prepend=-1) > 0])


def _means(ordered: Matrix, starts: NDArray[np.int64]) -> Matrix:
    """The mean of each run of ascending values."""
    return np.asarray(np.add.reduceat(ordered, starts) / np.diff(starts, append=len(ordered)))


@dataclass(frozen=True)
class _Prepared:
    """Features so that a dissimilarity is 1 - an inner product, or a squared distance.

    Attributes:
        rows: (n, d) float64.
        rdm: which dissimilarity.
        tolerance: of a tie: its width, and what is added to that relative to its value.
        without_direction: examples without one, (m,).
    """

    rows: Matrix
    rdm: Rdm
    tolerance: tuple[float, float]
    without_direction: NDArray[np.int64]

    @classmethod
    def of(cls, x: NDArray[Any], rdm: Rdm) -> _Prepared:
        """Those of (n, d) features."""
        rows = x.astype(np.float64)
        if rdm == "euclidean":
            rows = rows - rows.mean(0)  # the distances stay, and lose no digits to the mean
            if rows.size * len(rows) <= _EXACT:
                return cls(x.astype(np.float64), rdm, (0.0, _ROUND_OFF), np.empty(0, np.int64))
            largest = float(np.square(rows).sum(1).max())
            return cls(rows, rdm, (_ROUND_OFF * 2 * largest, 0.0), np.empty(0, np.int64))
        size = np.sqrt(np.square(rows).sum(1))
        if rdm == "correlation":
            rows = rows - rows.mean(1, keepdims=True)
        norm = np.sqrt(np.square(rows).sum(1))
        pointed = norm > 4 * np.finfo(x.dtype).eps * size
        lost = float((size[pointed] / norm[pointed]).max(initial=1.0))  # to the mean
        unit = rows / np.where(pointed, norm, np.nan)[:, None]
        return cls(unit, rdm, (_ROUND_OFF * 2 * lost, 0.0), np.flatnonzero(~pointed))

    def blocks(self) -> Iterator[Matrix]:
        """The dissimilarities of some rows at a time, in the order of `condensed_rdm`, squared for Euclidean ones."""
        rows, n, exact = self.rows, len(self.rows), self.tolerance[1] > 0
        square = np.square(rows).sum(1) if self.rdm == "euclidean" and not exact else np.empty(0)
        start = 0
        while start < n:
            end = min(n, start + max(1, _CHUNK // (start + 1)))
            if exact:
                from scipy.spatial.distance import cdist

                values = cdist(rows[start:end], rows[:end], "sqeuclidean")
            else:
                products = rows[start:end] @ rows[:end].T
                values = 1 - products
                if len(square):
                    values = np.maximum(square[start:end, None] + square[:end] - 2 * products, 0)  # round-off below 0
            yield values[np.tri(end - start, end, start - 1, dtype=bool)]
            start = end

    def dissimilarities(self, values: Matrix) -> Matrix:
        """What `blocks` yields, as dissimilarities."""
        return np.sqrt(values) if self.rdm == "euclidean" else values
