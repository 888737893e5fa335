"""The processes of a run: one, or as many as torchrun started; the device of this one, and what they say to another."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cka_probe.devices import device_named
from cka_probe.errors import OtherProcessError

T = TypeVar("T")

_meetings = count()  # all processes come to the same ones in the same order


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

    @property
    def on_this_machine(self) -> int:
        """How many of the processes run here."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_to_first(self, tensor: Tensor) -> None:
        """Put the sum over all processes into rank 0's tensor, and zeros into those of the others."""
        if self.size > 1:
            dist.all_reduce(tensor)
            if not self.writes:
                tensor.zero_()

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def blocks_to_first(self, blocks: Mapping[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Send the blocks of the other processes to rank 0, one at a time.

        Args:
            blocks: of this process, by numbers that are all different.

        Yields:
            On rank 0 the blocks of all others, on the CPU; elsewhere nothing, but the loop over it must be run.
        """
        if self.size == 1:
            return
        told = self.gathered([(number, block.shape, block.dtype) for number, block in blocks.items()])
        for rank in range(1, self.size):
            for number, shape, dtype in told[rank]:
                if self.writes:
                    received = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(received, rank)
                    yield number, received.cpu()
                elif rank == self.rank:
                    dist.send(blocks[number].to(self.device).contiguous(), 0)

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_first_in_the_end(self, value: T) -> T:
        """The same where rank 0 may take hours to get there."""
        self._await_first()
        return self.from_first(value)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Within the block rank 0 is alone, and the others follow: for what is fetched once and then there for all."""
        if not self.writes:
            self._await_first()
        yield
        if self.writes:
            self._await_first()

    def _await_first(self) -> None:
        """Wait until rank 0 gets here: collective operations give up after minutes."""
        if self.size > 1:
            store, key = _store(), f"cka-probe/meeting/{next(_meetings)}"
            store.add(key, int(self.writes))
            while store.add(key, 0) == 0:
                time.sleep(0.2)

    def average_buffers(self, network: nn.Module) -> None:
        """Put the mean of the running statistics of all processes into each."""
        if self.size > 1:
            from timm.utils.distributed import distribute_bn

            distribute_bn(network, self.size, reduce=True)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this run; within torchrun, its process group is there until the block ends.

    An error on one process ends all of them, and that of the process that fails first is told: torchrun stops the
    others, and what they raise over it is an `OtherProcessError`.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``; under torchrun, a GPU's number is that of the process.

    Raises:
        SpecError: the device is not there, or has no float64.
        OtherProcessError: another process failed before this one.
    """
    from timm.utils.distributed import init_distributed_device_so, is_distributed_env

    where = device_named(device)
    if not is_distributed_env():
        yield World(where)
        return
    found = init_distributed_device_so(str(where))
    try:
        yield World(torch.device(found["device"]), found["global_rank"], found["world_size"])
    except BaseException as error:
        if not _is_first_to_fail():
            raise OtherProcessError("Another process of the run failed before this one, and tells why.") from error
        raise
    finally:
        dist.destroy_process_group()


def _is_first_to_fail() -> bool:
    try:
        return bool(_store().add("cka-probe/errors", 1) == 1)
    except RuntimeError:
        return False  # the store went with the process that held it


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
