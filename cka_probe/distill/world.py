"""The processes of a run: one, or as many as torchrun started; the device of this one, and what they say to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cka_probe.errors import SpecError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        device: of this process.
        rank: of this process, from 0; rank 0 writes the files.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and tells what happens."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def average_buffers(self, network: nn.Module) -> None:
        """Put the mean of the running statistics of all processes into each."""
        if self.size > 1:
            from timm.utils.distributed import distribute_bn

            distribute_bn(network, self.size, reduce=True)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this run; within torchrun, its process group is there until the block ends.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``; under torchrun, a GPU's number is that of the process.

    Raises:
        SpecError: the device is not there.
    """
    from timm.utils.distributed import init_distributed_device_so, is_distributed_env

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise SpecError(f"The device {device!r} must be there, but is not. There are: {', '.join(there)}.") from error
    if not is_distributed_env():
        yield World(where)
        return
    found = init_distributed_device_so(name)
    try:
        yield World(torch.device(found["device"]), found["global_rank"], found["world_size"])
    finally:
        dist.destroy_process_group()
