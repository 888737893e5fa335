"""Representational dissimilarity matrices (RDMs) of many layers, and their correlations.

Dissimilarities that differ by no more than the round-off of their computation are ties. Otherwise the ranks of equal
ones, such as those of a category model, would be noise.

10,000 examples have 50 million dissimilarities a layer. They are kept as 16-bit codes, a rising function of the
dissimilarity, with a table a layer that says what a code stands for: its rank among those that are kept, or its value.
So a rank among fewer examples is a new table, and not a new sort. Up to 65,536 different dissimilarities the codes are
exact; beyond, they change Spearman's and Pearson's correlations by less than 1e-6. A tie has one code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cka_probe.estimation.arrays import LayerFeatures, Matrix
from cka_probe.estimation.collected import Doubt, Order, Replicates
from cka_probe.estimation.feature_store import Scratch

Rdm = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "kendall", "pearson"]

_CODES = 1 << 16
_ROUND_OFF = 8 * np.finfo(np.float64).eps
"""Of a dissimilarity, relative to |x|² + |y|²: four times what was seen of 10 to 500,000 features."""

_EXACT = 1 << 27
"""Up to so many products, Euclidean distances are summed from differences, so that close examples lose no digits."""

_UNDEFINED = (
    "the features of {images} have no direction (all are equal, or 0), so that their dissimilarities are not defined. "
    "Leave the images out, or use euclidean ones"
)

_LEAST_SPREAD = 1e-6
"""Of the dissimilarities, relative: below it, what is kept in float32 does not tell them apart."""

_CHUNK = 1 << 17  # of dissimilarities a layer at a time
LEVELS = 1024
"""To which the codes are reduced for Kendall's τ of many pairs: then it is off by up to about 1e-3."""

_EXACT_PAIRS = _CODES
"""Of examples, up to which Kendall's τ is computed from the codes themselves, which are exact there: 362 examples."""


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
    values = np.concatenate([block for _, block in prepared.blocks()])
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


@dataclass(frozen=True)
class RdmStatistic:
    """A `cka_probe.estimation.collected.Statistic`: the correlation of the RDMs of all pairs of layers.

    Attributes:
        rdm: which dissimilarity.
        comparison: which correlation.
        scratch: where the codes lie.
    """

    rdm: Rdm
    comparison: Comparison
    scratch: Scratch

    def __call__(self, layers: Sequence[LayerFeatures], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        coded = _Coded(layers, self.rdm, blocks, self.scratch)
        compared = _kendall if self.comparison == "kendall" else _correlated
        found = compared(coded, orders, ranks=self.comparison != "pearson")
        return replace(found, doubts=coded.doubts)

    def check(self, examples: int, widths: Sequence[int]) -> None:
        """Any number of features will do."""

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        return {"rdm": self.rdm, "rdm_comparison": self.comparison}


class _Coded:
    """The coded RDMs of all layers, and how often each code occurs: in all, and in pairs with an example of a block.

    Attributes:
        codes: (layers, pairs) uint16, row after row of the lower triangle.
        means: for each layer, what a code stands for, (codes,).
        counts: for each layer, (1 + blocks, codes): over all pairs, and over the pairs without a block.
        undefined: the layers without an RDM.
        doubts: layer -> that some of its examples have features without a direction.
        block_of: (n,) the block of each example; -1 where it is in none.
    """

    def __init__(self, layers: Sequence[LayerFeatures], rdm: Rdm, blocks: Sequence[slice], scratch: Scratch) -> None:
        self.n = n = len(layers[0].values)
        self.blocks = len(blocks)
        self.block_of = np.full(n, -1)
        for number, block in enumerate(blocks):
            self.block_of[block] = number
        self._scratch = scratch
        self.codes = scratch.empty((len(layers), n * (n - 1) // 2), np.uint16)
        self.means: list[Matrix] = []
        self.counts: list[NDArray[np.int64]] = []
        self.undefined: list[int] = []
        self.doubts: dict[int, Doubt] = {}
        for index, features in enumerate(layers):
            prepared = _Prepared.of(features.values, rdm)
            constant = features.is_constant()
            if len(prepared.without_direction) and not constant:
                self.doubts[index] = Doubt(_UNDEFINED, prepared.without_direction.tolist())
            if constant or len(prepared.without_direction) or not self._code(index, prepared):
                self.undefined.append(index)
                self.codes[index] = 0
                self.means.append(np.zeros(1))
                self.counts.append(np.zeros((1 + self.blocks, 1), np.int64))

    def chunks(self) -> Iterator[tuple[int, slice, NDArray[np.int64], NDArray[np.int64]]]:
        """Rows of one block at a time: the block, where their pairs lie, and the two examples of each pair."""
        for start, end in _row_chunks(self.n, self.block_of):
            row, col = _pairs(start, end)
            yield int(self.block_of[start]), slice(_offset(start), _offset(end)), row, col

    def _code(self, index: int, prepared: _Prepared) -> bool:
        """Fill in the codes of a layer; False where its dissimilarities are all the same."""
        values = self._scratch.empty((self.codes.shape[1],), np.float64)
        for where, block in prepared.blocks():
            values[where] = block
        order = np.argsort(values)
        ordered = values[order]
        starts = tie_starts(ordered, *prepared.tolerance)
        if not ordered[-1] - ordered[0] > _LEAST_SPREAD * abs(ordered[-1]) or len(starts) == 1:
            return False
        if len(starts) > _CODES:
            starts = _fewer(ordered, starts)
        size = len(starts)
        self.codes[index, order] = np.repeat(np.arange(size), np.diff(starts, append=len(ordered)))
        means = _means(prepared.dissimilarities(ordered), starts)
        counts = np.zeros((1 + self.blocks, size), np.int64)
        for block_of_row, where, _, col in self.chunks():
            codes = self.codes[index, where]
            counts[0] += np.bincount(codes, minlength=size)
            if self.blocks:
                other = self.block_of[col]
                both = np.bincount(other * size + codes, minlength=self.blocks * size).reshape(self.blocks, size)
                both[block_of_row] = both.sum(0)
                counts[1:] += both
        counts[1:] = counts[0] - counts[1:]
        self.means.append(means)
        self.counts.append(counts)
        return True


def _fewer(ordered: Matrix, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The starts of fewer codes: half of them part the ranks evenly, half the values. No tie is parted."""
    low, high = ordered[0], ordered[-1]
    by_rank = starts * (_CODES // 2 - 1) // len(ordered)
    by_value = ((ordered[starts] - low) / (high - low) * (_CODES // 2 - 1)).astype(np.int64)
    return np.asarray(starts[np.diff(by_rank + by_value, prepend=-1) > 0])


def _means(ordered: Matrix, starts: NDArray[np.int64]) -> Matrix:
    """The mean of each run of ascending values."""
    return np.asarray(np.add.reduceat(ordered, starts) / np.diff(starts, append=len(ordered)))


def _correlated(coded: _Coded, orders: Sequence[Order], *, ranks: bool) -> Replicates:
    """Spearman's ρ, or Pearson's r, of all pairs of layers: one matrix product a chunk."""
    layers = len(coded.codes)
    tables = [_tables(means, counts, ranks=ranks) for means, counts in zip(coded.means, coded.counts, strict=True)]
    kept = np.zeros((1 + coded.blocks, layers, layers))
    shuffled = np.zeros((len(orders), layers, layers))
    for block, where, row, col in coded.chunks():
        codes = coded.codes[:, where]
        for number in range(1 + coded.blocks):
            if number and number == block + 1:
                continue
            standard = np.stack([table[number][code] for table, code in zip(tables, codes, strict=True)])
            if number:
                standard *= coded.block_of[col] != number - 1
            kept[number] += standard @ standard.T
            if number == 0 and len(orders) == 1:
                (order,) = orders
                moved = coded.codes[:, pair_index(order[row], order[col])]
                other = np.stack([table[0][code] for table, code in zip(tables, moved, strict=True)])
                shuffled[0] += standard @ other.T
    if len(orders) > 1:
        _permute(coded, [table[0] for table in tables], orders, shuffled)
    return Replicates(_masked(coded, kept[0]), _masked(coded, kept[1:]), _masked(coded, shuffled))


def _permute(coded: _Coded, tables: Sequence[Matrix], orders: Sequence[Order], sums: Matrix) -> None:
    """Add up a permutation test: of so few examples that the values of all layers can lie side by side, pair by pair.

    A pair that changes its place takes a step through the memory then, and not one a layer.
    """
    values = np.stack([table[codes] for table, codes in zip(tables, coded.codes, strict=True)], axis=1)
    short = np.int32 if coded.n < 1 << 15 else np.int64  # half the memory traffic, and pairs have room in it
    moved = [order.astype(short) for order in orders]
    for _, where, row, col in coded.chunks():
        standard = values[where].T
        for number, order in enumerate(moved):
            sums[number] += standard @ values.take(pair_index(order[row], order[col]), axis=0)


def _tables(means: Matrix, counts: NDArray[np.int64], *, ranks: bool) -> Matrix:
    """(1 + blocks, codes): what each code stands for, with mean 0 and sum of squares 1 over the pairs kept."""
    total = counts.sum(1, keepdims=True)
    values = np.cumsum(counts, 1) - (counts - 1) / 2 if ranks else np.broadcast_to(means, counts.shape)
    centered = values - (counts * values).sum(1, keepdims=True) / np.maximum(total, 1)
    square = (counts * centered**2).sum(1, keepdims=True)
    return np.asarray(centered / np.sqrt(np.where(square > 0, square, np.inf)))


def _kendall(coded: _Coded, orders: Sequence[Order], **_: Any) -> Replicates:
    """Kendall's τ-b of all pairs of layers; of many pairs of examples, from the table of how often two levels meet."""
    if coded.codes.shape[1] <= _EXACT_PAIRS:
        return _exact_kendall(coded, orders)
    layers = len(coded.codes)
    level_of = [_levels(counts[0]) for counts in coded.counts]
    sizes = [int(levels[-1]) + 1 for levels in level_of]
    values = np.zeros((layers, layers))
    deleted = np.zeros((coded.blocks, layers, layers))
    shuffled = np.zeros((len(orders), layers, layers))
    known = [index for index in range(layers) if index not in coded.undefined]
    for i in known:
        for j in (j for j in known if i <= j):
            size = sizes[i] * sizes[j]
            table = np.zeros((1 + coded.blocks, size), np.int64)
            mixed = np.zeros((len(orders), size), np.int64)
            for block, where, row, col in coded.chunks():
                first = level_of[i][coded.codes[i, where]] * sizes[j]
                cell = first + level_of[j][coded.codes[j, where]]
                table[0] += np.bincount(cell, minlength=size)
                for number in range(coded.blocks):
                    inside = slice(None) if number == block else coded.block_of[col] == number
                    table[1 + number] += np.bincount(cell[inside], minlength=size)
                for which, order in enumerate(orders):
                    moved = coded.codes[j, pair_index(order[row], order[col])]
                    mixed[which] += np.bincount(first + level_of[j][moved], minlength=size)
            table[1:] = table[0] - table[1:]
            shape = (sizes[i], sizes[j])
            values[i, j] = values[j, i] = _tau(table[0].reshape(shape))
            for number in range(coded.blocks):
                deleted[number, i, j] = deleted[number, j, i] = _tau(table[1 + number].reshape(shape))
            for which in range(len(orders)):
                shuffled[which, i, j] = shuffled[which, j, i] = _tau(mixed[which].reshape(shape))
    return Replicates(_masked(coded, values), _masked(coded, deleted), _masked(coded, shuffled))


def _exact_kendall(coded: _Coded, orders: Sequence[Order]) -> Replicates:
    from scipy.stats import kendalltau

    row, col = _pairs(0, coded.n)
    everything = slice(None)
    kept = [(coded.block_of[row] != block) & (coded.block_of[col] != block) for block in range(coded.blocks)]
    moved = [pair_index(order[row], order[col]) for order in orders]
    layers = len(coded.codes)
    parts = [np.zeros((len(again), layers, layers)) for again in ([everything], kept, moved)]
    known = [index for index in range(layers) if index not in coded.undefined]
    for i in known:
        for j in (j for j in known if i <= j):
            first, second = coded.codes[i], coded.codes[j]
            compared = (
                [(first, second)],
                [(first[pairs], second[pairs]) for pairs in kept],
                [(first, second[pairs]) for pairs in moved],
            )
            for part, sides in zip(parts, compared, strict=True):
                part[:, i, j] = part[:, j, i] = [kendalltau(*pair).statistic for pair in sides]
    values, deleted, shuffled = (_masked(coded, part) for part in parts)
    return Replicates(values[0], deleted, shuffled)


def _levels(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each code its level: the code itself where there are few, else so that the levels are about equally full."""
    if len(counts) <= LEVELS:
        return np.arange(len(counts))
    return np.asarray(np.unique((np.cumsum(counts) - 1) * LEVELS // counts.sum(), return_inverse=True)[1])


def _tau(table: NDArray[np.int64]) -> float:
    """Kendall's τ-b from a contingency table (Agresti 2010, section 7.1)."""
    above = np.cumsum(table, 0) - table
    above_left = np.cumsum(above, 1) - above
    difference = float((table * (2 * above_left + above - above.sum(1, keepdims=True))).sum())
    total = float(table.sum())
    untied = [total * (total - 1) - float((sums * (sums - 1)).sum()) for sums in (table.sum(1), table.sum(0))]
    return 2 * difference / float(np.sqrt(untied[0]) * np.sqrt(untied[1]))


def _masked(coded: _Coded, matrices: Matrix) -> Matrix:
    for index in coded.undefined:
        matrices[..., index, :] = matrices[..., :, index] = np.nan
    return matrices


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

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """The dissimilarities of some rows at a time, squared for Euclidean ones, with where they lie."""
        rows, n, exact = self.rows, len(self.rows), self.tolerance[1] > 0
        square = np.square(rows).sum(1) if self.rdm == "euclidean" and not exact else np.empty(0)
        for start, end in _row_chunks(n, np.zeros(n)):
            if exact:
                from scipy.spatial.distance import cdist

                values = cdist(rows[start:end], rows[:end], "sqeuclidean")
            else:
                products = rows[start:end] @ rows[:end].T
                values = 1 - products
                if len(square):
                    values = np.maximum(square[start:end, None] + square[:end] - 2 * products, 0)  # round-off below 0
            yield slice(_offset(start), _offset(end)), values[np.tri(end - start, end, start - 1, dtype=bool)]

    def dissimilarities(self, values: Matrix) -> Matrix:
        """What `blocks` yields, as dissimilarities."""
        return np.sqrt(values) if self.rdm == "euclidean" else values


def _row_chunks(n: int, block_of: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Runs of rows of the lower triangle, within one block, of about so many pairs as fit a chunk."""
    start = 0
    while start < n:
        end = min(n, start + max(1, _CHUNK // (start + 1)))
        end = start + int(np.argmin(np.append(block_of[start:end] == block_of[start], False)))
        yield start, end
        start = end


def _pairs(start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = np.arange(start, end)
    row = np.repeat(rows, rows)
    return row, np.arange(len(row)) - np.repeat(_offset(rows) - _offset(start), rows)


def _offset(row: Any) -> Any:
    return row * (row - 1) // 2


def pair_index(row: NDArray[Any], col: NDArray[Any]) -> NDArray[Any]:
    """Where pairs lie, whichever of their examples comes first."""
    return np.asarray(_offset(np.maximum(row, col)) + np.minimum(row, col))
