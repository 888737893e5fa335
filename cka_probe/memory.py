"""Out of memory, explained: in which module, at which batch size, and which to try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cka_probe import errors


@contextmanager
def explaining_out_of_memory(what: str, network: nn.Module | None, batch_size: int) -> Iterator[None]:
    """Within the block, running out of memory raises an `errors.OutOfMemoryError`.

    Args:
        what: is done in the block, for the message.
        network: the innermost of its modules that was running is named too.
        batch_size: images at a time.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where = _running_module(error, network) if network is not None else ""
        smaller = f"Try --batch-size {batch_size // 2}." if batch_size >= 8 else "Try a smaller network or image size."
        raise errors.OutOfMemoryError(
            f"Out of memory in {where}{what} with {batch_size} images at a time. {smaller}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, on a GPU or on a CPU."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "allocate memory" in str(error) or "not enough memory" in str(error)  # PyTorch's CPU allocator


def _running_module(error: BaseException, network: nn.Module) -> str:
    """The innermost module of the network whose forward was running, from the traceback."""
    names = {module: name for name, module in network.named_modules() if name}
    found = ""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = names.get(owner, found)
        frame = frame.tb_next
    return f"layer {found!r} of " if found else ""
