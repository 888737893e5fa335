"""How much memory is in use, and was at most: of the GPU the networks run on, else of this process."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_ONLY = "5"  # of proc(5), clear_refs: nothing is cleared but the high-water mark


def in_use(device: torch.device) -> int:
    """Bytes in use: of the GPU by tensors, else the resident memory of this process; 0 where that is unknown.

    Memory that was freed is given back first.
    """
    give_back()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def give_back() -> None:
    """Give freed memory of this process back to the system, which glibc does late where it is in pieces."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak(device: torch.device) -> None:
    """Let `peak` start again from what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # then it stays that of the whole process, which is no less
        _CLEAR.write_text(_PEAK_ONLY)


def peak(device: torch.device) -> int:
    """Bytes that were in use at most, as `in_use` counts them; 0 where the system does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:")), 0)
