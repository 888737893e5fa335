"""Running out of memory, explained: in which layer, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cka_probe.activations.modules import modules_of
from cka_probe.runtime.memory import is_out_of_memory, out_of_memory


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
        raise out_of_memory(where + what, batch_size) from error


def _running_module(error: BaseException, network: nn.Module) -> str:
    """The innermost module of the network whose forward was running, from the traceback."""
    names = {module: name for name, module in modules_of(network).items() if name}
    found = ""
    frame = error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = names.get(owner, found)
        frame = frame.tb_next
    return f"layer {found!r} of " if found else ""
