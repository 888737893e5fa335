"""What the measures on arrays share: the features that a caller hands in, checked once, and the ratio at the end."""

from __future__ import annotations

from math import sqrt
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.kernels import MIN_EXAMPLES

Array: TypeAlias = Tensor | ArrayLike

ROUND_OFF = 1e-12
"""Of centered float64 Gram matrices, relative: see `cka_probe.kernels.center`."""


def paired_features(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 tensors, (n, d₁) and (n, d₂), scaled to a largest magnitude of 1.

    The scale keeps squares of very small or very large features inside the range of float64; CKA does not see it.

    Raises:
        FeatureError: they are not (n, d) with the same n ≥ 4, or not finite.
    """
    first, second = _features(x, "x"), _features(y, "y")
    second = second.to(first.device)
    if len(first) != len(second):
        raise FeatureError(
            f"x and y must hold the same examples, one a row, but x has {len(first)} rows and y {len(second)}."
        )
    return first, second


def cosine(cross: float, own_x: float, own_y: float) -> float:
    """CKA from the three inner products of centered Gram matrices.

    Raises:
        FeatureError: one of the squared norms is 0, and CKA would divide by it.
    """
    for name, own in (("x", own_x), ("y", own_y)):
        if not own > 0:
            raise FeatureError(
                f"{name} must differ between examples in more than one of them, but has no such structure (its HSIC "
                "with itself is 0): CKA is undefined."
            )
    return cross / (sqrt(own_x) * sqrt(own_y))


def _features(values: Any, name: str) -> Tensor:
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(_numbers(values))
    except (TypeError, ValueError) as error:
        raise FeatureError(f"{name} must be an array of real numbers, but: {error}") from error
    if tensor.is_complex():
        raise FeatureError(f"{name} must be an array of real numbers, but is complex.")
    tensor = tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)  # MPS has no float64
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise FeatureError(
            f"{name} must have the shape (examples, features), but has {tuple(tensor.shape)}. "
            f"Flatten each example: {name}.reshape(len({name}), -1)."
        )
    if len(tensor) < MIN_EXAMPLES:
        raise FeatureError(f"CKA needs at least {MIN_EXAMPLES} examples, but {name} has {len(tensor)}.")
    if not torch.isfinite(tensor).all():
        raise FeatureError(f"{name} must be finite, but holds NaN or infinity.")
    largest = tensor.abs().max()
    return tensor / largest if largest > 0 else tensor


def _numbers(values: Any) -> NDArray[np.float64]:
    if np.iscomplexobj(values):
        raise TypeError("it is complex")
    return np.array(values, dtype=np.float64)
