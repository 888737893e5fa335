"""How the Gram matrices of a subject's layers are made, so that float32 suffices: decided by one batch for all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from cka_probe.estimation.gram import Features, Way
from cka_probe.estimation.kernels import Product
from cka_probe.runtime.devices import DeferredRead


class Precision:
    """The ways of a subject's layers, and whether they were good enough.

    On a CPU each batch is looked at, and one that needs a better way gets it. A GPU is not waited for: batches as large
    as the first get what that one needed, with a margin, and a warning follows where one of them needed more. A smaller
    batch, the last one, is looked at: fewer examples need more precision.

    Args:
        epsilon: of the arithmetic of the network, where it is coarser than the types of its activations say.

    Attributes:
        ways: of each layer, by its index; None before the first batch, which decides it: batches may be done by others,
            or in a later run, and a decision that followed from the batch before would make the result depend on who
            did what.
        doubtful: layers that needed a better way in a later batch.
    """

    def __init__(self, epsilon: float = 0.0) -> None:
        self._epsilon = epsilon
        self.ways: dict[int, Way] | None = None
        self.doubtful: set[int] = set()
        self._found: dict[int, Way] = {}
        self._examples = 0  # of the batch that decided
        self._unseen: dict[int, Product] = {}
        self._later = DeferredRead()

    def features(
        self,
        layer: int,
        x: Tensor,
        pooling: Callable[[], Tensor] | None = None,
        *,
        epsilon: float = 0.0,
    ) -> Features:
        """The features of a layer, by its index, (n, d), with what is known of it.

        Args:
            layer: its index.
            x: (n, d).
            pooling: makes the features that are kept, where they are others.
            epsilon: of the type that they were stored in, where it is coarser than that of ``x``.
        """
        wait = not x.is_cuda or len(x) < self._examples
        return Features(
            x, way=(self.ways or {}).get(layer), wait=wait, pooling=pooling, epsilon=max(self._epsilon, epsilon)
        )

    def note(self, layer: int, features: Features) -> None:
        """Learn from features whose Gram matrix was made, if any measure wanted it."""
        if features.unseen is not None:
            self._unseen[layer] = features.unseen
        elif features.way is not None:
            self._found[layer] = features.way
            self._examples = max(self._examples, len(features.x))

    def end_batch(self) -> None:
        """Every layer was noted."""
        if self.ways is None:
            self.ways = dict(self._found)
        if self._unseen:
            products = self._unseen
            self._unseen = {}
            checks = [(layer, found.precise, found.shape, len(found.statistics)) for layer, found in products.items()]

            def see(statistics: list[float]) -> None:
                values = iter(statistics)
                for layer, precise, shape, count in checks:
                    if not precise(list(islice(values, count)), *shape, 1.0):
                        self.doubtful.add(layer)

            self._later.read(torch.cat([found.statistics for found in products.values()]), see)

    def finish(self) -> None:
        """Look at the last batch too."""
        self._later.finish()
