"""Running statistics of the assistant's own, for a tail whose network keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.cutting.recordings import restoring_buffers
from cka_probe.activations.modules import modules_of


class OwnStatistics(nn.Module):
    """Copies of the buffers that a tail changes when it runs, such as the running statistics of batch norm.

    Args:
        tail: whose modules another network uses too. It runs once, in the mode in which it is.
        activation: that it runs on.
    """

    def __init__(self, tail: nn.Module, activation: Tensor) -> None:
        super().__init__()
        self._owners: tuple[nn.Module, ...]
        self.__dict__["_owners"] = tuple(changed := _changed(tail, activation))  # no children
        for number, (module, names) in enumerate(changed.items()):
            own = nn.Module()
            for name in names:
                buffer = module._buffers[name]
                assert buffer is not None
                own.register_buffer(name, buffer.detach().clone())
            self.add_module(str(number), own)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within the block, the modules of the tail read and change these in place of their network's."""
        pairs = list(zip(self._owners, self.children(), strict=True))
        theirs = [{name: module._buffers[name] for name in own._buffers} for module, own in pairs]
        for module, own in pairs:
            module._buffers.update(own._buffers)
        try:
            yield
        finally:
            for (module, own), buffers in zip(pairs, theirs, strict=True):
                own._buffers.update({name: module._buffers[name] for name in buffers})
                module._buffers.update(buffers)


@torch.no_grad()
def _changed(tail: nn.Module, activation: Tensor) -> dict[nn.Module, list[str]]:
    """Module -> the names of its buffers that a pass changes."""
    modules = list(dict.fromkeys(modules_of(tail).values()))
    found: dict[nn.Module, list[str]] = {}
    with restoring_buffers(tail):
        before = {
            (module, name): (buffer, buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        tail(activation)
        for (module, name), (buffer, values) in before.items():
            now: Any = module._buffers[name]
            if now is not buffer or not torch.equal(buffer, values):
                found.setdefault(module, []).append(name)
    return found
