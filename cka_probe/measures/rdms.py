"""Representational dissimilarity matrices (RDMs) of many layers, and their correlations.

10,000 examples have 50 million dissimilarities a layer. They are kept as 16-bit codes, a rising function of the
dissimilarity, with a table a layer that says what a code stands for: its rank among those that are kept, or its value.
So a rank among fewer examples is a new table, and not a new sort. Up to 65,536 different dissimilarities the codes are
exact; beyond, they change Spearman's and Pearson's correlations by less than 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cka_probe.measures.arrays import Matrix, is_constant
from cka_probe.measures.collected import Order, Replicates
from cka_probe.measures.storage import Scratch

Rdm = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "kendall", "pearson"]

_CODES = 1 << 16
_CELLS = 1 << 22
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
        (n (n - 1) / 2,) float64; NaN for an example whose features have no direction (all equal, or all 0).
    """
    return np.concatenate([block for _, block in _blocks_of(_prepared(x, rdm), rdm)])


@dataclass(frozen=True)
class RdmStatistic:
    """A `cka_probe.measures.collected.Statistic`: the correlation of the RDMs of all pairs of layers.

    Attributes:
        rdm: which dissimilarity.
        comparison: which correlation.
        scratch: where the codes lie.
    """

    rdm: Rdm
    comparison: Comparison
    scratch: Scratch

    def __call__(self, layers: Sequence[NDArray[Any]], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        coded = _Coded(layers, self.rdm, blocks, self.scratch)
        compared = _kendall if self.comparison == "kendall" else _correlated
        return compared(coded, orders, ranks=self.comparison != "pearson")

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
        block_of: (n,) the block of each example; -1 where it is in none.
    """

    def __init__(self, layers: Sequence[NDArray[Any]], rdm: Rdm, blocks: Sequence[slice], scratch: Scratch) -> None:
        self.n = n = len(layers[0])
        self.blocks = len(blocks)
        self.block_of = np.full(n, -1)
        for number, block in enumerate(blocks):
            self.block_of[block] = number
        self.codes = scratch.empty((len(layers), n * (n - 1) // 2), np.uint16)
        self.means: list[Matrix] = []
        self.counts: list[NDArray[np.int64]] = []
        self.undefined: list[int] = []
        for index, features in enumerate(layers):
            prepared = _prepared(features, rdm)
            if is_constant(features) or not np.isfinite(prepared).all() or not self._code(index, prepared, rdm):
                self.undefined.append(index)
                self.codes[index] = 0
                self.means.append(np.zeros(1))
                self.counts.append(np.zeros((1 + self.blocks, 1), np.int64))

    def chunks(self) -> Iterator[tuple[int, slice, NDArray[np.int64], NDArray[np.int64]]]:
        """Rows of one block at a time: the block, where their pairs lie, and the two examples of each pair."""
        for start, end in _row_chunks(self.n, self.block_of):
            row, col = _pairs(start, end)
            yield int(self.block_of[start]), slice(_offset(start), _offset(end)), row, col

    def _code(self, index: int, prepared: Matrix, rdm: Rdm) -> bool:
        """Fill in the codes of a layer; False where its dissimilarities are all the same."""
        values: NDArray[Any] = np.empty(self.codes.shape[1], np.float32 if self.codes.shape[1] > _CODES else np.float64)
        for where, block in _blocks_of(prepared, rdm):
            values[where] = block
        low, high = float(values.min()), float(values.max())
        if not high - low > 1e-6 * abs(high):
            return False
        if len(values) <= _CODES:
            different, self.codes[index] = np.unique(values, return_inverse=True)
            means = different.astype(np.float64)
        else:
            means = self._quantized(index, values, low, high)
        size = len(means)
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

    def _quantized(self, index: int, values: NDArray[np.float32], low: float, high: float) -> Matrix:
        """Codes that part the ranks evenly and the values evenly, each into half of the codes."""
        scale = (_CELLS - 1) / (high - low)
        cells = np.zeros(_CELLS, np.int64)
        chunks = [slice(start, start + _CELLS) for start in range(0, len(values), _CELLS)]
        for chunk in chunks:
            cells += np.bincount(((values[chunk] - low) * scale).astype(np.int32), minlength=_CELLS)
        by_rank = np.cumsum(cells) * (_CODES // 2 - 1) // len(values)
        by_value = np.arange(_CELLS) * (_CODES // 2 - 1) // _CELLS
        code_of_cell = np.unique(by_rank + by_value, return_inverse=True)[1].astype(np.uint16)
        size = int(code_of_cell[-1]) + 1
        sums, counts = np.zeros(size), np.zeros(size)
        for chunk in chunks:
            codes = code_of_cell[((values[chunk] - low) * scale).astype(np.int32)]
            self.codes[index, chunk] = codes
            sums += np.bincount(codes, values[chunk], minlength=size)
            counts += np.bincount(codes, minlength=size)
        return sums / np.maximum(counts, 1)


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
    return Replicates(*(_masked(coded, part) for part in (kept[0], kept[1:], shuffled)))


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
    return Replicates(*(_masked(coded, part) for part in (values, deleted, shuffled)))


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


def _prepared(x: NDArray[Any], rdm: Rdm) -> Matrix:
    """The features so that a dissimilarity is 1 - an inner product, or a distance; NaN where one has no direction."""
    rows = x.astype(np.float64)
    if rdm == "euclidean":
        return np.asarray(rows - rows.mean(0))  # the distances stay, and lose no digits to the mean
    size = np.sqrt(np.square(rows).sum(1, keepdims=True))
    if rdm == "correlation":
        rows = rows - rows.mean(1, keepdims=True)
    norm = np.sqrt(np.square(rows).sum(1, keepdims=True))
    return np.asarray(rows / np.where(norm > 4 * np.finfo(x.dtype).eps * size, norm, np.nan))


def _blocks_of(prepared: Matrix, rdm: Rdm) -> Iterator[tuple[slice, Matrix]]:
    """The dissimilarities of some rows at a time, with where they lie."""
    n = len(prepared)
    square = np.square(prepared).sum(1) if rdm == "euclidean" else np.empty(0)
    for start, end in _row_chunks(n, np.zeros(n)):
        products = prepared[start:end] @ prepared[:end].T
        if rdm == "euclidean":
            squares = square[start:end, None] + square[:end] - 2 * products
            values = np.sqrt(np.maximum(squares, 0))  # round-off alone is below 0
        else:
            values = 1 - products
        yield slice(_offset(start), _offset(end)), values[np.tri(end - start, end, start - 1, dtype=bool)]


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
