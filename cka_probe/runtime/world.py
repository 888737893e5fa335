"""The processes of a run: one, or as many as torchrun started; the device of this one, and what they say to another."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cka_probe.errors import OtherProcessError, SpecError
from cka_probe.runtime.devices import device_named
from cka_probe.runtime.user_code import describe_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MEETING = timedelta(minutes=5)
"""How long processes wait for the others to start."""

_meetings = count()  # all processes come to the same ones in the same order
_groups = count()  # the same of the process groups that they form one after the other


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
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """How many of the processes run here."""
        return max(_whole("LOCAL_WORLD_SIZE", self.size), 1) if self.size > 1 else 1

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
        shapes = self.gathered([(number, block.shape, block.dtype) for number, block in blocks.items()])
        for rank in range(1, self.size):
            for number, shape, dtype in shapes[rank]:
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

    @torch.no_grad()
    def share_buffers(self, network: nn.Module) -> None:
        """Make floating-point buffers the same on all processes: running statistics their mean, others rank 0's."""
        if self.size == 1:
            return
        for name, buffer in network.named_buffers():
            if not buffer.is_floating_point():
                continue
            values = buffer.detach().contiguous()
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                dist.all_reduce(values)
                values /= self.size
            else:
                dist.broadcast(values, 0)
            buffer.copy_(values)


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this run; within torchrun, its process group is there until the block ends.

    An error on one process ends all of them, and that of the process that fails first is shown: torchrun stops the
    others, and what they raise over it is an `OtherProcessError`.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``; under torchrun, a GPU's number is that of the process.

    Raises:
        SpecError: the device is not there, or has no float64.
        OtherProcessError: another process failed before this one.
    """
    where = device_named(device)
    place = _place()
    if place is None:
        yield World(where)
        return
    rank, size, local = place
    if where.type == "cuda":
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    _join(rank, size, "nccl" if where.type == "cuda" else "gloo")
    try:
        yield World(where, rank, size)
    except BaseException as error:
        if not _is_first_to_fail():
            raise OtherProcessError(
                "Another process of the run failed before this one. Its message says why."
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _join(rank: int, size: int, backend: str) -> None:
    """Meet the other processes.

    Raises:
        SpecError: they do not come, or the place where they should is not there.
    """
    if rank == 0:
        logger.info("Waiting for all %d processes of the run.", size)
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], _whole("MASTER_PORT"))  # for a wrong name torch waits long
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=_MEETING)))
        store = PrefixStore(f"cka-probe/{next(_groups)}", store)  # without what a group before left in it
        store.set_timeout(dist.distributed_c10d._get_default_timeout(dist.Backend(backend)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError, OSError, OverflowError) as error:
        raise SpecError(
            f"The {size} processes of the run could not meet at {os.environ['MASTER_ADDR']}: {describe_error(error)} "
            "Check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, or start the run by torchrun."
        ) from error


def _place() -> tuple[int, int, int] | None:
    """Rank, number of processes and rank on this machine; None where this process is the only one.

    Several are started by torchrun, or by srun with the place where they meet.

    Raises:
        SpecError: this one is of several, but they cannot find each other.
    """
    meeting = ["MASTER_ADDR", "MASTER_PORT"]
    ranks = ("SLURM_PROCID", "SLURM_LOCALID")
    if "WORLD_SIZE" in os.environ:
        size, advice = _whole("WORLD_SIZE"), "Start the run by torchrun, or unset WORLD_SIZE for one process"
        if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
            ranks = ("RANK", "LOCAL_RANK")
            meeting.append("RANK")
    else:
        size, advice = _whole("SLURM_NTASKS", 1), "Start the run by torchrun, set them, or use srun --ntasks=1"
        # In an allocation, srun alone sets this one, for the tasks that it starts.
        by_srun = _whole("SLURM_STEP_NUM_TASKS", 1) > 1
        if size > 1 and not by_srun and not all(os.environ.get(name) for name in meeting):
            logger.info("Slurm allocated %d tasks, but srun did not start this process: it runs alone.", size)
            return None
    if size <= 1:
        return None
    missing = [name for name in meeting if not os.environ.get(name)]
    if missing:
        raise SpecError(f"This is one of {size} processes, which need {', '.join(missing)} to meet. {advice}.")
    rank, local = (_whole(name, 0) for name in ranks)
    if not 0 <= rank < size:
        raise SpecError(
            f"The rank of a process must be below the {size} processes of its run, but is {rank}. {advice}."
        )
    return rank, size, local


def _whole(name: str, default: int | None = None) -> int:
    """An environment variable that is a whole number.

    Raises:
        SpecError: it is something else.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise SpecError(f"The environment variable {name} must be a whole number, but is {text!r}.") from error


def _is_first_to_fail() -> bool:
    try:
        return bool(_store().add("cka-probe/errors", 1) == 1)
    except RuntimeError:
        return False  # the store went with the process that held it


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
