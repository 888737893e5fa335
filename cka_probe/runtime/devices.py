"""Which device the networks run on, how many cores there are, and how to hear from a GPU without waiting."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from cka_probe.errors import SpecError
from cka_probe.runtime.memory import out_of_memory
from cka_probe.runtime.ranges import shown

Key = TypeVar("Key")


def device_named(name: str) -> torch.device:
    """The device of that name, which must be there; ``"auto"`` is CUDA where there is one.

    Raises:
        SpecError: it is not there, or has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(name).startswith("mps"):
        raise SpecError("The device 'mps' has no float64, which the sums need. Use --device cpu.")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):  # ValueError: it holds surrogates
        device = None
    if device == torch.device("cpu", 0):
        return torch.device("cpu")
    if device is None or not (str(device) in there or (device == torch.device("cuda") and len(there) > 1)):
        missing = " PyTorch finds no CUDA GPU here." if str(name).startswith("cuda") and len(there) == 1 else ""
        raise SpecError(f"--device must be auto or one of {', '.join(there)}, but is {shown(name)}.{missing}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a GPU that is there, but broken or full
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"The device {device} cannot be used: {reason} Choose another one with --device.") from error
    return device


def device_name(device: torch.device) -> str:
    """What a record calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_device(batches: Iterable[tuple[Key, list[Tensor]]], device: torch.device) -> Iterator[tuple[Key, list[Tensor]]]:
    """The tensors of each batch on a device; on a GPU, each batch is copied while the one before is worked on.

    Args:
        batches: what stands for a batch, and its tensors, in pinned memory for a GPU.
        device: a CUDA device or a CPU.
    """
    if device.type != "cuda":
        for key, tensors in batches:
            yield key, [tensor.to(device) for tensor in tensors]
        return
    copying, working = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting: tuple[Key, list[Tensor], torch.cuda.Event] | None = None
    for key, tensors in batches:
        images = len(tensors[0]) if tensors else 0
        with torch.cuda.stream(copying):
            try:
                copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
            except torch.OutOfMemoryError as error:
                raise out_of_memory(f"copying the images to {device}", images) from error
            copied = torch.cuda.Event()
            copied.record(copying)
        for copy in copies:
            copy.record_stream(working)
        if waiting is not None:
            working.wait_event(waiting[2])
            yield waiting[0], waiting[1]
        waiting = key, copies, copied
    if waiting is not None:
        working.wait_event(waiting[2])
        yield waiting[0], waiting[1]


class DeferredRead:
    """Values that a device computes, read when the next ones come, so that the device has work meanwhile.

    On a CPU they are read at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.cuda.Event, Tensor, Callable[[list[Any]], None]] | None = None

    def read(self, values: Tensor, see: Callable[[list[Any]], None]) -> None:
        """Read the values that came before; call ``see`` with these, as lists of numbers, in the next call."""
        self.finish()
        if values.is_cuda:
            copy = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(values.device))
            self._pending = event, copy, see
        else:
            see(values.tolist())

    def finish(self) -> None:
        """Wait for the values that were not read yet."""
        if self._pending is not None:
            (event, values, see), self._pending = self._pending, None
            event.synchronize()
            see(values.tolist())
