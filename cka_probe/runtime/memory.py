"""The memory of the loop: kept from batch to batch, and running out of it explained."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cka_probe.errors import OutOfMemoryError

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3), glibc's malloc.h

_kept = False  # by a block that is open: one inside it changes nothing


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Within the block, memory that PyTorch frees on a CPU is used again, and not given back to the system.

    Otherwise glibc returns the memory of large activations at once, and the system hands it out again, page by page and
    zeroed: at 224 px that can be a third of the time of a forward pass. Where the C library is another one, nothing is
    changed.
    """
    global _kept
    if _kept or device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _kept = True
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _kept = False
        # The thresholds cannot be read. They grow with what a process frees, and these are the largest they grow to.
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # PyTorch's CPU allocator. Other errors may be of any class, also of one whose text cannot be read.
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "allocate memory" in said or "not enough memory" in said


def out_of_memory(what: str, batch_size: int) -> OutOfMemoryError:
    """The error that says so, and what to try.

    Args:
        what: was done.
        batch_size: images at a time.
    """
    smaller = f"Try --batch-size {batch_size // 2}." if batch_size >= 8 else "Try a smaller network or image size."
    return OutOfMemoryError(f"Out of memory in {what} with {batch_size} images at a time. {smaller}")
