"""Gram matrices, centering and HSIC: the equations, as pure functions of tensors.

``n`` examples, ``d`` features, ``K`` a Gram matrix (n, n). Leading dimensions (``...``) are batches of matrices.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MedianRule = Literal["off-diagonal", "with-diagonal"]

MIN_EXAMPLES = 4
"""Below 4 examples the unbiased HSIC, with n - 3 in its denominator, does not exist."""

_BLOCK_BYTES = 1 << 22  # of features at a time on a CPU: they stay in its cache from one pass over them to the next
_GPU_BLOCK_BYTES = 1 << 28


def linear_gram(x: Tensor) -> Tensor:
    """The linear Gram matrix of the centered features, ``(x - mean) @ (x - mean).T``.

    Features are centered first: U-centering would remove the mean anyway, but only after it had cancelled most of the
    digits of a float32 product.

    Args:
        x: (n, d) features, any floating dtype. Float64 stays float64; all others are multiplied in float32.

    Returns:
        (n, n) float32, or float64 where the features are or need it. All zeros where they do not differ between the
        examples beyond the round-off of their dtype. Not finite where they are not.
    """
    if x.dtype == torch.float64:
        return _exact_gram(x, torch.finfo(torch.float64).eps)
    gram, mean_square = _centered_product(x, torch.float32)
    spread, epsilon = gram.diagonal().amax().item(), torch.finfo(torch.float32).eps
    # Float32 holds too little where squares leave its range, and where the spread is near the round-off of the mean.
    if _in_range(spread) and spread > (256 * epsilon) ** 2 * mean_square.item():
        return gram
    return _exact_gram(x, epsilon)


def uncentered_gram(x: Tensor) -> Tensor | None:
    """The linear Gram matrix ``x @ x.T`` where its float32 is precise enough to be centered afterwards, else None.

    On wide activations `linear_gram` spends up to a third of its time on the mean. Without it, entries are wrong by
    about 2e-7 (more where d is above 32,768) times the ratio ‖K̃‖ / ‖U(K)‖ of what there is before and after
    U-centering, independently of each other, so that CKA is wrong by about an n-th of that. The ratio is held below
    n/2, so that CKA stays within about 1e-7.

    Args:
        x: (n, d) features, float32 or of lower precision.

    Returns:
        (n, n) float32, or None: use `linear_gram`.
    """
    n = x.shape[0]
    products = _SelfProduct(n, x.device)
    for block in x.split(_block_width(x, torch.float32), dim=1):
        products.add(block.float())
    gram = products.whole()
    diagonal = gram.diagonal()
    norm = torch.linalg.vector_norm
    rows = gram.sum(1) - diagonal
    found = torch.stack([diagonal.amax(), norm(gram), norm(diagonal), norm(rows), rows.sum()])
    largest, norm_all, norm_diagonal, norm_rows, total = found.tolist()
    # K̃ is the sum of U(K) and of the aᵢ + aⱼ off its diagonal, which are orthogonal to each other.
    before = norm_all**2 - norm_diagonal**2
    sum_a = total / (2 * (n - 1))
    square_a = (norm_rows**2 - 2 * sum_a * total + n * sum_a**2) / (n - 2) ** 2
    after = before - 2 * ((n - 2) * square_a + sum_a**2)
    limit = min(n / 2, 128) * min(1, 32768 / x.shape[1])  # beyond 128, the float32 sums do not tell `after` from 0
    return gram if _in_range(largest) and before <= limit**2 * after else None


def squared_distances(gram: Tensor) -> Tensor:
    """Squared Euclidean distances, (..., n, n), from a linear Gram matrix, (..., n, n)."""
    square = gram.diagonal(dim1=-2, dim2=-1)
    distances = (square[..., :, None] + square[..., None, :] - 2 * gram).clamp_min(0)  # round-off alone is below 0
    distances.diagonal(dim1=-2, dim2=-1).zero_()
    return distances


def squared_bandwidth(distances: Tensor, *, threshold: float = 1.0, median: MedianRule = "off-diagonal") -> float:
    """The squared bandwidth of an RBF kernel by the median rule of Kornblith et al. (2019).

    Args:
        distances: (n, n) squared distances.
        threshold: σ as a multiple of the median distance, above 0; the paper uses 0.2, 0.4 and 0.8.
        median: ``"off-diagonal"`` takes σ = threshold × the median distance between different examples.
            ``"with-diagonal"`` takes σ² = threshold² × the median of all n² squared distances, the n zeros of the
            diagonal among them, as the notebook published with the paper does: a little smaller.

    Returns:
        σ², 0 where half of the examples or more coincide.
    """
    if median == "with-diagonal":
        return threshold**2 * _median(distances.flatten())
    n = len(distances)
    row, column = torch.triu_indices(n, n, offset=1, device=distances.device)
    return threshold**2 * _median(distances[row, column].sqrt()) ** 2


def rbf_gram(distances: Tensor, squared_bandwidth: Tensor | float) -> Tensor:
    """The Gaussian Gram matrix exp(-d² / 2σ²), (..., n, n), of squared distances of that shape."""
    return torch.exp(distances / (-2 * squared_bandwidth))


def u_center(gram: Tensor) -> Tensor:
    """U-centering (Székely & Rizzo 2014, definition 2): zero diagonal, every row and column sums to 0.

    Args:
        gram: (..., n, n) symmetric, n ≥ 4.

    Returns:
        (..., n, n), so that ⟨U(K), U(L)⟩ / (n (n - 3)) is the unbiased HSIC of Song et al. (2012, eq. 5).
    """
    n = gram.shape[-1]
    off_diagonal = gram.clone()
    off_diagonal.diagonal(dim1=-2, dim2=-1).zero_()
    row = off_diagonal.sum(-1) / (n - 2)
    shift = row - row.sum(-1, keepdim=True) / (2 * (n - 1))
    centered = off_diagonal.sub_(shift[..., :, None]).sub_(shift[..., None, :])
    centered.diagonal(dim1=-2, dim2=-1).zero_()
    return centered


def double_center(gram: Tensor) -> Tensor:
    """HKH with H = I - 11ᵀ/n, so that ⟨HKH, HLH⟩ / (n - 1)² is the biased HSIC of Gretton et al. (2005).

    Args:
        gram: (..., n, n) symmetric.

    Returns:
        (..., n, n).
    """
    row = gram.mean(-1)
    shift = row - row.mean(-1)[..., None] / 2
    return (gram - shift[..., :, None]).sub_(shift[..., None, :])


def center(gram: Tensor, *, debiased: bool, tolerance: float = 0.0) -> Tensor:
    """`u_center` where ``debiased``, else `double_center`; exactly zero where nothing but round-off is left.

    U-centering leaves nothing of a Gram matrix of the form aᵢ + aⱼ, such as that of one example apart from otherwise
    equal ones. What remains of it in floating point must not pass for a signal.

    Args:
        gram: (..., n, n) symmetric.
        debiased: which centering.
        tolerance: of the norm off the diagonal, relative to that before centering: above the round-off of the entries.

    Returns:
        (..., n, n).
    """
    centered = u_center(gram) if debiased else double_center(gram)
    norm = torch.linalg.vector_norm
    diagonal = norm(gram.diagonal(dim1=-2, dim2=-1), dim=-1)
    off_diagonal = (norm(gram, dim=(-2, -1)).square() - diagonal.square()).clamp_min(0).sqrt()
    is_signal = norm(centered, dim=(-2, -1)) > tolerance * off_diagonal
    return centered.mul_(is_signal[..., None, None])  # a NaN stays one


def lower_triangle(n: int, order: Tensor | None = None) -> Tensor:
    """Where the lower triangle, with the diagonal, of a flattened (n, n) matrix is: half of a symmetric one says all.

    Args:
        n: rows.
        order: (n,) int64: the triangle of ``matrix[order][:, order]``, without making it.

    Returns:
        (n (n + 1) / 2,) int64, row after row.
    """
    row, column = torch.tril_indices(n, n, device=None if order is None else order.device)
    if order is not None:
        row, column = order[row], order[column]
    where: Tensor = row * n + column
    return where


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """All inner products ⟨A, B⟩ of symmetric matrices.

    Args:
        a: (layers, n (n + 1) / 2): their lower triangles.
        b: (others, n (n + 1) / 2).

    Returns:
        (layers, others).
    """
    n = int((2 * a.shape[1]) ** 0.5)
    example = torch.arange(n, device=a.device)
    diagonal = example * (example + 3) // 2
    return 2 * (a @ b.T) - a[:, diagonal] @ b[:, diagonal].T


def _exact_gram(x: Tensor, epsilon: float) -> Tensor:
    """The same in float64; zero where the spread is within the round-off ``epsilon`` of the features' own dtype."""
    gram, mean_square = _centered_product(x, torch.float64, skip_constant=True)
    return gram.masked_fill_(gram.diagonal().amax() <= (4 * epsilon) ** 2 * mean_square, 0)


def _centered_product(x: Tensor, dtype: torch.dtype, *, skip_constant: bool = False) -> tuple[Tensor, Tensor]:
    """The (n, n) Gram matrix of the centered features in ``dtype``, and the squared norm of their mean.

    With ``skip_constant``, features that are equal in all examples, however large, are left out of both.

    On wide activations the memory, not the arithmetic, sets the time: the centered copy is made in one small buffer,
    again and again.
    """
    n, device = x.shape[0], x.device
    width = min(_block_width(x, dtype), x.shape[1])
    products = _SelfProduct(n, device)
    mean_square = torch.zeros((), dtype=dtype, device=device)
    buffer = torch.empty(n * width, dtype=dtype, device=device)
    weights = torch.full((n,), 1 / n, dtype=dtype, device=device)
    for block in x.split(width, dim=1):
        columns = block if block.dtype == dtype else block.to(dtype)
        mean = weights @ columns  # faster than columns.mean(0)
        centered = torch.sub(columns, mean, out=buffer[: columns.numel()].view(columns.shape))
        if skip_constant:
            varying = centered.abs().amax(0) > 16 * torch.finfo(dtype).eps * mean.abs()
            centered, mean = centered.mul_(varying), mean * varying
        mean_square += mean @ mean
        products.add(centered)
    return products.whole(), mean_square


def _block_width(x: Tensor, dtype: torch.dtype) -> int:
    """How many columns of (n, d) features to take at a time."""
    block_bytes = _BLOCK_BYTES if x.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(512, block_bytes // (x.shape[0] * dtype.itemsize))


class _SelfProduct:
    """The sum of x @ x.T over blocks of columns, of which little more than the lower triangle is multiplied on a CPU.

    BLAS has a routine for that (syrk), but PyTorch does not offer it. So the matrix is halved, and halved again: the
    products between the halves of one size are one batched product, and those within the smallest another.

    Args:
        n: examples.
        device: of the features.
    """

    _HALVINGS, _SMALLEST = 2, 32

    def __init__(self, n: int, device: torch.device) -> None:
        self._n = n
        self._sizes = [n]
        while device.type == "cpu" and len(self._sizes) <= self._HALVINGS:
            size = self._sizes[-1]
            if size % 2 or size < 2 * self._SMALLEST:
                break
            self._sizes.append(size // 2)
        self._sums: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add the product of (n, w) columns."""
        _, *halves = self._sizes
        own = x.unflatten(0, (-1, self._sizes[-1]))
        pairs = [(own, own)]
        for size in halves:
            both = x.unflatten(0, (-1, 2, size))
            pairs.append((both[:, 1], both[:, 0]))
        if self._sums:
            for sum_, (a, b) in zip(self._sums, pairs, strict=True):
                sum_.baddbmm_(a, b.mT)
        else:
            self._sums = [torch.bmm(a, b.mT) for a, b in pairs]

    def whole(self) -> Tensor:
        """The (n, n) sum."""
        own, *between = self._sums
        _, *halves = self._sizes
        if not halves:
            return own[0]
        gram = own.new_empty(self._n, self._n)
        size = halves[-1]
        gram.view(-1, size, self._n // size, size).diagonal(0, 0, 2).copy_(own.permute(1, 2, 0))
        for size, lower in zip(halves, between, strict=True):
            blocks = gram.view(-1, 2, size, self._n // (2 * size), 2, size)
            blocks[:, 1, :, :, 0].diagonal(0, 0, 2).copy_(lower.permute(1, 2, 0))
            blocks[:, 0, :, :, 1].diagonal(0, 0, 2).copy_(lower.permute(2, 1, 0))
        return gram


def _in_range(square: float) -> bool:
    """Whether a float32 square is so far from both ends of its range that it and its like have all their digits."""
    return 1e-30 < square < 1e30


def _median(values: Tensor) -> float:
    """The median, (m,) -> the mean of the two middle values where m is even (`torch.median` takes the lower)."""
    ordered = values.sort().values
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()
