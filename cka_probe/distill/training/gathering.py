"""One batch out of those of all processes, for losses that relate images: several processes train as one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def position() -> tuple[int, int]:
    """The rank of this process, and how many there are: (0, 1) where it is the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, by rank, (n · processes, ...) on every process.

    The gradient is that of the sum of what all processes make of the rows. So where each has a loss of its own, and
    data-parallel training averages their gradients, the weights move as by the gradient of the mean of these losses.

    Args:
        rows: (n, ...), as many on every process.
    """
    if position()[1] == 1:
        return rows
    together: Tensor = _Gathered.apply(rows)
    return together


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        context.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        first = dist.get_rank() * context.rows
        return gradient[first : first + context.rows]
