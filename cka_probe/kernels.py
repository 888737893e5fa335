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

_BLOCK_BYTES = 1 << 21  # of centered features at a time on a CPU: they stay in its cache between centering and product
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
    if 1e-30 < spread < 1e30 and spread > (256 * epsilon) ** 2 * mean_square.item():
        return gram
    return _exact_gram(x, epsilon)


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
    total = row.sum(-1)[..., None] / (n - 1)
    shift = row - total / 2
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
    return gram - shift[..., :, None] - shift[..., None, :]


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
    is_noise = norm(centered, dim=(-2, -1)) <= tolerance * off_diagonal
    return centered.masked_fill_(is_noise[..., None, None], 0)


def _exact_gram(x: Tensor, epsilon: float) -> Tensor:
    """The same in float64; zero where the spread is within the round-off ``epsilon`` of the features' own dtype."""
    gram, mean_square = _centered_product(x, torch.float64, skip_constant=True)
    return gram.masked_fill_(gram.diagonal().amax() <= (4 * epsilon) ** 2 * mean_square, 0)


def _centered_product(x: Tensor, dtype: torch.dtype, *, skip_constant: bool = False) -> tuple[Tensor, Tensor]:
    """The (n, n) Gram matrix of the centered features in ``dtype``, and the squared norm of their mean.

    With ``skip_constant``, features that are equal in all examples, however large, are left out of both.

    On wide activations the memory, not the arithmetic, sets the time: the centered copy is made in one small buffer,
    again and again, and only the lower triangle is multiplied, in strips of rows.
    """
    n, device = x.shape[0], x.device
    on_cpu = device.type == "cpu"
    width = max(512, (_BLOCK_BYTES if on_cpu else _GPU_BLOCK_BYTES) // (n * dtype.itemsize))
    strip = n if not on_cpu else 64 if n > 64 else 32
    gram = torch.zeros(n, n, dtype=dtype, device=device)
    mean_square = torch.zeros((), dtype=dtype, device=device)
    buffer = torch.empty(n * min(width, x.shape[1]), dtype=dtype, device=device)
    for block in x.split(width, dim=1):
        columns = block if block.dtype == dtype else block.to(dtype)
        mean = columns.mean(0)
        centered = torch.sub(columns, mean, out=buffer[: columns.numel()].view(columns.shape))
        if skip_constant:
            varying = centered.abs().amax(0) > 16 * torch.finfo(dtype).eps * mean.abs()
            centered, mean = centered.mul_(varying), mean * varying
        for start in range(0, n, strip):
            stop = start + strip
            gram[start:stop, :stop].addmm_(centered[start:stop], centered[:stop].T)
        mean_square += mean @ mean
    for start in range(strip, n, strip):
        gram[:start, start : start + strip] = gram[start : start + strip, :start].T
    return gram, mean_square


def _median(values: Tensor) -> float:
    """The median, (m,) -> the mean of the two middle values where m is even (`torch.median` takes the lower)."""
    ordered = values.sort().values
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()
