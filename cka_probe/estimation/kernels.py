"""Gram matrices and their centering: the equations, as pure functions of tensors.

``n`` examples, ``d`` features, ``K`` a Gram matrix (n, n). Leading dimensions (``...``) are batches of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

MedianRule = Literal["off-diagonal", "with-diagonal"]

_BLOCK_BYTES = 1 << 22  # of features at a time on a CPU: they stay in its cache from one pass over them to the next
_GPU_BLOCK_BYTES = 1 << 28

_TENSOR_CORE_WIDTH = 2048
"""From so many features on, a GPU rounds them to TF32 (11 bits) before it multiplies them. Sums of fewer products
average that away less well, and cost little in full float32."""


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
    if x.dtype != torch.float64:
        product = centered_product(x)
        if product.is_precise():
            return product.gram
    return exact_gram(x)


def exact_gram(x: Tensor) -> Tensor:
    """`linear_gram` in float64; zero where the spread is within the round-off of the features' own dtype."""
    epsilon = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    gram, mean_square = _centered(x, torch.float64, skip_constant=True)
    return gram.masked_fill_(gram.diagonal().amax() <= (4 * epsilon) ** 2 * mean_square, 0)


@dataclass(frozen=True)
class Product:
    """A Gram matrix in float32, and whether that was precise enough.

    Attributes:
        gram: (n, n) float32.
        statistics: (s,) float32, on the device of ``gram``.
        precise: whether it was, of the s statistics, of n, of d and of a margin.
        shape: (n, d) of the features.
    """

    gram: Tensor
    statistics: Tensor
    precise: Callable[[Sequence[float], int, int, float], bool]
    shape: tuple[int, int]

    def is_precise(self, margin: float = 1.0) -> bool:
        """Whether it can stand for the Gram matrix, so many times better than need be: waits for the device."""
        return self.precise(self.statistics.tolist(), *self.shape, margin)


def uncentered_product(x: Tensor) -> Product:
    """The linear Gram matrix ``x @ x.T``, precise where float32 is enough for it to be centered afterwards.

    On wide activations `linear_gram` spends up to a third of its time on the mean. Without it, entries are wrong by
    about 2e-7 (more where d is above 32,768) times the ratio ‖K̃‖ / ‖U(K)‖ of what there is before and after
    U-centering, independently of each other, so that CKA is wrong by about an n-th of that. The ratio is held below
    n/2, so that CKA stays within about 1e-7; on the tensor cores of a GPU, within 1e-5.

    Args:
        x: (n, d) features, float32 or of lower precision.
    """
    (n, d), device = x.shape, x.device
    gram = torch.empty(n, n, device=device)
    at_once = x.dtype == torch.float32 or _multiplies_into_float32(x)
    width = d if at_once else _block_width(x, torch.float32)  # of what is converted at once
    for index, block in enumerate(x.split(width, dim=1)):
        _add_products(gram, block if at_once else block.float(), keep=index > 0)
    gram = _mirrored(gram)
    diagonal, entries = gram.diagonal(), gram.view(-1)
    rows = gram @ torch.ones(n, device=device) - diagonal  # faster than sum(1), as dot() is than norm()
    found = [diagonal.amax(), entries.dot(entries), diagonal.dot(diagonal), rows.dot(rows), rows.sum()]
    return Product(gram, torch.stack(found), _uncentered_is_precise, (n, d))


def centered_product(x: Tensor) -> Product:
    """`linear_gram` in float32, precise where that holds enough.

    Args:
        x: (n, d) features, float32 or of lower precision.
    """
    gram, mean_square = _centered(x, torch.float32)
    found = torch.stack([gram.diagonal().amax(), mean_square])
    return Product(gram, found, _centered_is_precise, (len(x), x.shape[1]))


def _uncentered_is_precise(statistics: Sequence[float], n: int, d: int, margin: float) -> bool:
    largest, square_all, square_diagonal, square_rows, total = statistics
    # K̃ is the sum of U(K) and of the aᵢ + aⱼ off its diagonal, which are orthogonal to each other.
    before = square_all - square_diagonal
    sum_a = total / (2 * (n - 1))
    square_a = (square_rows - 2 * sum_a * total + n * sum_a**2) / (n - 2) ** 2
    after = before - 2 * ((n - 2) * square_a + sum_a**2)
    limit = (
        min(n / 2, 128) * min(1, 32768 / d) / margin
    )  # beyond 128, the float32 sums do not distinguish `after` from 0
    return 1e-15 < largest < 1e15 and before <= limit**2 * after


def _centered_is_precise(statistics: Sequence[float], n: int, d: int, margin: float) -> bool:
    spread, mean_square = statistics
    # Float32 holds too little where squares leave its range, and where the spread is near the round-off of the mean.
    epsilon = torch.finfo(torch.float32).eps
    return 1e-30 < spread < 1e30 and spread > (256 * epsilon * margin) ** 2 * mean_square


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


def u_center(gram: Tensor, *, overwrite: bool = False) -> Tensor:
    """U-centering (Székely & Rizzo 2014, definition 2): zero diagonal, every row and column sums to 0.

    Args:
        gram: (..., n, n) symmetric, n ≥ 4.
        overwrite: center in the memory of ``gram``.

    Returns:
        (..., n, n), so that ⟨U(K), U(L)⟩ / (n (n - 3)) is the unbiased HSIC of Song et al. (2012, eq. 5).
    """
    n, centered = gram.shape[-1], gram if overwrite else gram.clone()
    diagonal = centered.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    row = centered.sum(-1) / (n - 2)
    shift = row - row.sum(-1, keepdim=True) / (2 * (n - 1))
    centered.sub_(shift[..., :, None]).sub_(shift[..., None, :])
    diagonal.zero_()
    return centered


def double_center(gram: Tensor, *, overwrite: bool = False) -> Tensor:
    """HKH with H = I - 11ᵀ/n, so that ⟨HKH, HLH⟩ / (n - 1)² is the biased HSIC of Gretton et al. (2005).

    Args:
        gram: (..., n, n) symmetric.
        overwrite: center in the memory of ``gram``.

    Returns:
        (..., n, n).
    """
    row = gram.mean(-1)
    shift = row - row.mean(-1)[..., None] / 2
    return (gram if overwrite else gram.clone()).sub_(shift[..., :, None]).sub_(shift[..., None, :])


def center(gram: Tensor, *, debiased: bool, tolerance: float = 0.0, overwrite: bool = False) -> Tensor:
    """`u_center` where ``debiased``, else `double_center`; exactly zero where nothing but round-off is left.

    U-centering leaves nothing of a Gram matrix of the form aᵢ + aⱼ, such as that of one example apart from otherwise
    equal ones. What remains of it in floating point must not pass for a signal.

    Args:
        gram: (..., n, n) symmetric.
        debiased: which centering.
        tolerance: of the norm off the diagonal, relative to that before centering: above the round-off of the entries.
        overwrite: center in the memory of ``gram``.

    Returns:
        (..., n, n).
    """
    norm = torch.linalg.vector_norm
    diagonal = norm(gram.diagonal(dim1=-2, dim2=-1), dim=-1)
    off_diagonal = (norm(gram, dim=(-2, -1)).square() - diagonal.square()).clamp_min(0).sqrt()
    centered = (u_center if debiased else double_center)(gram, overwrite=overwrite)
    is_signal = norm(centered, dim=(-2, -1)) > tolerance * off_diagonal
    return centered.mul_(is_signal[..., None, None])  # a NaN stays one


def _centered(x: Tensor, dtype: torch.dtype, *, skip_constant: bool = False) -> tuple[Tensor, Tensor]:
    """The (n, n) Gram matrix of the centered features in ``dtype``, and the squared norm of their mean.

    With ``skip_constant``, features that are equal in all examples, however large, are left out of both.

    On wide activations the memory, not the arithmetic, sets the time: the centered copy is made in one small buffer,
    again and again.
    """
    n, device = x.shape[0], x.device
    width = min(_block_width(x, dtype), x.shape[1])
    gram = torch.empty(n, n, dtype=dtype, device=device)
    mean_square = torch.zeros((), dtype=dtype, device=device)
    buffer = torch.empty(n * width, dtype=dtype, device=device)
    weights = torch.full((n,), 1 / n, dtype=dtype, device=device)
    for index, block in enumerate(x.split(width, dim=1)):
        columns = block if block.dtype == dtype else block.to(dtype)
        mean = weights @ columns  # faster than columns.mean(0)
        centered = torch.sub(columns, mean, out=buffer[: columns.numel()].view(columns.shape))
        if skip_constant:
            varying = centered.abs().amax(0) > 16 * torch.finfo(dtype).eps * mean.abs()
            centered, mean = centered.mul_(varying), mean * varying
        mean_square += mean @ mean
        _add_products(gram, centered, keep=index > 0)
    return _mirrored(gram), mean_square


def _block_width(x: Tensor, dtype: torch.dtype) -> int:
    """How many columns of (n, d) features to take at a time."""
    block_bytes = _BLOCK_BYTES if x.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(512, block_bytes // (x.shape[0] * dtype.itemsize))


def _add_products(gram: Tensor, x: Tensor, *, keep: bool) -> None:
    """Add x @ x.T, of (n, w) columns, to the lower triangle of ``gram``, or put it there without what it held.

    BLAS has a routine for that (syrk), but PyTorch does not offer it: two products leave out a quarter of the work.
    """
    half = len(gram) // 2
    if x.dtype != gram.dtype:
        gram[:half, :half] = torch.mm(x[:half], x[:half].T, out_dtype=gram.dtype)
        gram[half:] = torch.mm(x[half:], x.T, out_dtype=gram.dtype)
        return
    with _tensor_cores() if x.is_cuda and x.shape[1] >= _TENSOR_CORE_WIDTH else nullcontext():
        gram[:half, :half].addmm_(x[:half], x[:half].T, beta=int(keep))
        gram[half:].addmm_(x[half:], x.T, beta=int(keep))


def _multiplies_into_float32(x: Tensor) -> bool:
    """Whether products of these features, of 16 bits each, can be summed in float32 without converting them first."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.__version__ >= "2.8"


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Within the block, a GPU may multiply float32 matrices as TF32, with sums in float32; float64 stays what it is."""
    settings: Any = torch.backends.cuda.matmul
    before = getattr(settings, "fp32_precision", None)  # from PyTorch 2.9 on
    if before == "tf32" or (before is None and settings.allow_tf32):
        yield
        return
    settings.allow_tf32 = True  # the older switch sets both; only to read it fails where the two disagree
    try:
        yield
    finally:
        settings.allow_tf32 = False
        if before is not None:
            settings.fp32_precision = before


def _mirrored(gram: Tensor) -> Tensor:
    """``gram`` with its lower left, which `_add_products` made, put above the diagonal too."""
    half = len(gram) // 2
    gram[:half, half:] = gram[half:, :half].T
    return gram


def _median(values: Tensor) -> float:
    """The median, (m,) -> the mean of the two middle values where m is even (`torch.median` takes the lower)."""
    ordered = values.sort().values
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()
