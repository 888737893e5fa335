"""How a network is called, everywhere: it changes nothing for the others, and its errors name it.

A network gets a copy of the images in its own floating type, and random numbers that follow from a key alone. Gradient
mode, default type, number of threads and the like are afterwards what they were, and so are the network's buffers.
What ``torch.compile`` made runs as plain Python, so that hooks see each module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cka_probe.activations.modules import modules_of
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.user_code import current_modes, keeping_modes, naming_errors, set_modes

logger = logging.getLogger(__name__)


def run_network(
    network: nn.Module, images: Tensor, doing: str, *, key: tuple[int, ...] | None = None, eager: bool = True
) -> Any:
    """The output of a network on images.

    Args:
        network: on the device of the images.
        images: (n, c, h, w); the network gets a copy.
        doing: begins the message where it raises something: ``"'vit' in batch 5 of 10"``.
        key: seeds its random numbers, and the global random state is kept; where None, it draws from that state.
        eager: run what is compiled as plain Python.

    Raises:
        NetworkError: it raises anything but a `CkaProbeError`, a KeyboardInterrupt or that memory is short.
    """
    with ExitStack() as stack:
        stack.enter_context(naming_errors(f"{doing} raised"))
        if eager:
            stack.enter_context(eagerly())
        stack.enter_context(keeping_modes())
        _AROUND.append(current_modes())
        stack.callback(_AROUND.pop)
        if key is not None:
            stack.enter_context(keeping_random_state())
            seed_everything(*key)
        if network in _BUFFERS:
            stack.callback(_BUFFERS[network].restore)
        return network(_own(network, images))


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the block, what ``torch.compile`` made runs as plain Python."""
    if "torch._dynamo" not in sys.modules:  # to import it takes seconds, and before that nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Within the block, each pass of `run_network` starts from the buffers that the network has now."""
    before = _BUFFERS.get(network)
    keep_buffers(network)
    try:
        yield
    finally:
        if before is None:
            _BUFFERS.pop(network, None)
        else:
            _BUFFERS[network] = before


def keep_buffers(network: nn.Module) -> None:
    """From now on, each pass of `run_network` starts from the buffers that the network has now."""
    _BUFFERS[network] = _Buffers(network)


@contextmanager
def watching_weights(network: nn.Module, name: str) -> Iterator[None]:
    """Warn where the network changed its own parameters within the block: copies of all would take much memory."""
    before = _weights(network)
    yield
    after = _weights(network)
    changed = [path for path, value in before.items() if path in after and repr(after[path]) != repr(value)]
    if changed:
        logger.warning(
            "%s changes its own weights while it runs (%s). Its values depend on how often it ran before.",
            name, ", ".join(changed[:3]),
        )  # fmt: skip


class _Buffers:
    """The buffers of a network, to be put back after each pass."""

    def __init__(self, network: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules_of(network).values():
            if isinstance(module, torch.jit.ScriptModule):  # its buffers are not Python's
                continue
            for name, buffer in module._buffers.items():
                if buffer is None or is_lazy(buffer):
                    continue
                try:
                    values = buffer.detach().clone()
                    buffer.detach().copy_(values)
                except (RuntimeError, NotImplementedError):
                    continue  # it cannot be written, so that the network does not change it either
                self._kept.append((module, name, buffer, values))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back. One of another shape is a cache that has grown, and stays."""
        changed: list[Tensor] = []
        values: list[Tensor] = []
        for module, name, buffer, kept in self._kept:
            now = module._buffers.get(name)
            if now is None or now.shape != kept.shape or buffer.shape != kept.shape:
                continue
            module._buffers[name] = buffer
            changed.append(buffer.detach())
            values.append(kept)
        if changed:
            torch._foreach_copy_(changed, values)


_BUFFERS: WeakKeyDictionary[nn.Module, _Buffers] = WeakKeyDictionary()


@contextmanager
def own_modes() -> Iterator[None]:
    """Within the block, which a hook opens in `run_network`, gradient mode and the like are those from before it."""
    with keeping_modes():
        if _AROUND:
            set_modes(_AROUND[-1])
        yield


_AROUND: list[list[Any]] = []
"""The modes around each pass that is under way."""


def _own(network: nn.Module, images: Tensor) -> Tensor:
    """A copy of the images in the type of the network's weights."""
    kind = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), images.dtype)
    return images.clone() if kind == images.dtype else images.to(kind)


@torch.no_grad()
def _weights(network: nn.Module) -> dict[str, tuple[int, float]]:
    """Path -> version and sum of each parameter; the version of one that changes by ``.data`` stays."""
    found = {path: weight for path, weight in network.named_parameters() if not is_lazy(weight)}
    plain = {path: weight for path, weight in found.items() if weight.is_floating_point() and weight.numel()}
    sums = [weight.sum(dtype=torch.float64).cpu() for weight in plain.values()]
    return {path: (weight._version, float(total)) for (path, weight), total in zip(plain.items(), sums, strict=True)}
