"""What the measures on arrays share: the features that a caller hands in, checked once, and the ratio at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.runtime.ranges import MIN_EXAMPLES

Array: TypeAlias = Tensor | ArrayLike
Matrix: TypeAlias = NDArray[np.float64]

_FLOAT64 = float(np.finfo(np.float64).eps)

LARGEST_EXPONENT = 128
"""Of features whose squares, and sums of them, are within the range of float64: float32 has no larger ones."""

ROUND_OFF = 1e-12
"""Of centered float64 Gram matrices, relative: see `cka_probe.estimation.kernels.center`."""


def paired_features(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 tensors, (n, d₁) and (n, d₂), scaled to a largest magnitude of 1.

    The scale keeps squares of very small or very large features inside the range of float64; CKA does not see it.

    Raises:
        FeatureError: they are not (n, d) with the same n ≥ 4, or not finite.
    """
    first, second = _paired(x, y)
    return _scaled(first), _scaled(second)


def paired_matrices(x: Array, y: Array, *, same_features: bool = False) -> tuple[Matrix, Matrix]:
    """Both as float64 arrays on the CPU, (n, d₁) and (n, d₂), scaled to a largest magnitude of 1.

    Args:
        x: features.
        y: features of the same examples.
        same_features: whether they must be of the same features too, d₁ = d₂, and keep their scale.

    Raises:
        FeatureError: they are not (n, d) with the same n ≥ 4, not finite, or of unequal widths that should be equal.
    """
    first, second = _paired(x, y)
    if same_features and first.shape[1] != second.shape[1]:
        raise FeatureError(
            f"x and y must hold the same features of two views, but x has {first.shape[1]} and y {second.shape[1]}."
        )
    if not same_features:
        first, second = _scaled(first), _scaled(second)
    return first.cpu().numpy(), second.cpu().numpy()


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """The features of a layer for all examples, and how precise they are.

    Attributes:
        values: (n, d): the features times 2**-exponent.
        epsilon: of the arithmetic that made them, relative: that of their type, or of autocast's.
        exponent: not 0 where squares of the features themselves would leave the range of float64.
    """

    values: NDArray[Any]
    epsilon: float
    exponent: int = 0

    @classmethod
    def of(cls, features: NDArray[Any], epsilon: float) -> LayerFeatures:
        """Features of any scale."""
        exponent = 0
        if features.dtype == np.float64:
            exponent = int(np.frexp(np.abs(features).max())[1])
        if abs(exponent) <= LARGEST_EXPONENT:
            return cls(features, epsilon)
        return cls(np.ldexp(features, -exponent), epsilon, exponent)

    def first(self, examples: int) -> LayerFeatures:
        """Those of the first examples."""
        return replace(self, values=self.values[:examples])

    def is_constant(self) -> bool:
        """Whether they differ between the examples by no more than their round-off."""
        rows = self.values.astype(np.float64)
        first = rows[0]  # to take away a row is exact; a mean of equal rows has a round-off of its own
        spread = np.square(rows - first).sum(1).max()
        return bool(spread <= (4 * self.epsilon) ** 2 * (first @ first))


def paired_layers(x: Array, y: Array) -> tuple[LayerFeatures, LayerFeatures]:
    """`paired_matrices`, with the precision of the types that they came in.

    Raises:
        FeatureError: as `paired_matrices`; or one of them is constant over the examples.
    """
    first, second = paired_matrices(x, y)
    layers = LayerFeatures(first, _epsilon(x)), LayerFeatures(second, _epsilon(y))
    for name, layer in zip("xy", layers, strict=True):
        if layer.is_constant():
            raise FeatureError(f"{name} must differ between the examples, but is constant, so the value is undefined.")
    return layers


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


def _paired(x: Array, y: Array) -> tuple[Tensor, Tensor]:
    first, second = _features(x, "x"), _features(y, "y")
    second = second.to(first.device)
    if len(first) != len(second):
        raise FeatureError(
            f"x and y must hold the same examples, one per row, but x has {len(first)} rows and y {len(second)}."
        )
    return first, second


def _scaled(features: Tensor) -> Tensor:
    largest = features.abs().max()
    return features / largest if largest > 0 else features


def _features(values: Any, name: str) -> Tensor:
    if isinstance(values, np.ma.MaskedArray):
        raise FeatureError(f"{name} must not be a masked array. Remove the masked rows, or fill in their values.")
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
        raise FeatureError(f"A measure needs at least {MIN_EXAMPLES} examples, but {name} has {len(tensor)}.")
    if not torch.isfinite(tensor).all():
        raise FeatureError(f"{name} must be finite, but holds NaN or infinity.")
    return tensor


def _numbers(values: Any) -> NDArray[np.float64]:
    if np.iscomplexobj(values):
        raise TypeError("it is complex")
    return np.array(values, dtype=np.float64)


def _epsilon(values: Array) -> float:
    """Of the type of an array or a tensor; that of float64 for any but a floating type."""
    if isinstance(values, Tensor):
        return torch.finfo(values.dtype).eps if values.is_floating_point() else _FLOAT64
    dtype = np.asarray(values).dtype
    return float(np.finfo(dtype).eps) if dtype.kind == "f" else _FLOAT64
