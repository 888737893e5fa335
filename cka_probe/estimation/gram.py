"""The features of a layer for a batch, and their Gram matrix, as precise as it must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cka_probe.estimation.kernels import Product, centered_product, exact_gram, squared_distances, uncentered_product

Way = Literal["uncentered", "centered", "exact"]
"""How a Gram matrix is made, each slower than the one before and of use for more features: see
`cka_probe.estimation.kernels`."""

_GPU_MARGIN = 2.0
"""How much more precise than need be a GPU's Gram matrix is for its way to be that of later batches, unseen."""

_PRODUCTS: dict[Way, Callable[[Tensor], Product]] = {"uncentered": uncentered_product, "centered": centered_product}


class Features:
    """The features of one layer for one batch, (n, d), and what measures compute of them once.

    Attributes:
        x: (n, d) features.
        pooled: (n, d) features for measures that keep them; `x` itself unless something else was given.
        way: how `gram` is made, or was; None before, where nothing is known of the layer yet. Float32 that turns out
            not to be precise enough for this batch gives place to the next way.
        epsilon: of the arithmetic that made them, relative: that of their type, or more where it is given.
        exponent: set before `gram` is read where squares of the features leave float64; `gram` is that of the features
            times 2**-exponent.
        unseen: what `gram` was made by, where it was not waited for to see whether it is precise; else None.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        way: Way | None = None,
        wait: bool = True,
        pooling: Callable[[], Tensor] | None = None,
        epsilon: float = 0.0,
    ) -> None:
        self.x = x
        self.exponent = 0
        self.epsilon = max(epsilon, torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
        self.way = way
        self.unseen: Product | None = None
        self._wait = wait or way is None
        self._pooling = pooling

    @cached_property
    def pooled(self) -> Tensor:
        return self.x if self._pooling is None else self._pooling()

    @cached_property
    def gram(self) -> Tensor:
        """A linear Gram matrix, (n, n) float32 or float64, precise once it is centered."""
        ways: Sequence[Way] = () if self.way == "exact" or self.x.dtype == torch.float64 else tuple(_PRODUCTS)
        for way in ways[1:] if self.way == "centered" else ways:
            product = _PRODUCTS[way](self.x)
            if not self._wait:
                self.unseen = product
                return product.gram
            if product.is_precise(_GPU_MARGIN if self.x.is_cuda else 1.0):
                self.way = way
                return product.gram
        self.way = "exact"
        if not self.exponent:
            return exact_gram(self.x)
        half = -self.exponent // 2  # 2**-exponent itself may leave float64
        return exact_gram(self.x * 2.0**half * 2.0 ** (-self.exponent - half))

    @cached_property
    def squared_distances(self) -> Tensor:
        """Squared Euclidean distances between the examples, (n, n) float64; not to be changed."""
        return squared_distances(self.gram.double())
