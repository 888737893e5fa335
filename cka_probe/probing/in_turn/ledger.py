"""What a network's operations take, counted while it runs: arithmetic, memory at once, memory moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Operations:
    """What was counted.

    Attributes:
        flops: of matrix products, convolutions and attention, a multiplication and an addition being two.
        alive: bytes of intermediate results at once, at most. What an operation uses inside is not seen.
        moved: bytes that operations read and wrote.
    """

    flops: float
    alive: float
    moved: float


def count_operations(run: Callable[[], object]) -> Operations:
    """Call ``run``, and count what the PyTorch operations in it take."""
    ledger = _Ledger()
    with FlopCounterMode(display=False) as flops, ledger:
        run()
    return Operations(float(flops.get_total_flops()), float(ledger.peak), float(ledger.moved))


class _Ledger(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self._total = 0
        self.peak = 0
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, made = _tensors((args, kwargs)), _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in taken}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        if fresh or not made or func._schema.is_mutable:  # a view moves nothing
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *made))
        for tensor in fresh:
            self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = size
        self._total += size
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._total -= self._alive.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
