"""Activations of a network in training, taken with autograd by hooks that stay on from pass to pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.errors import NetworkError
from cka_probe.hooks import tensors_in
from cka_probe.trace import TracedLayer


class Taps:
    """Taps on layers of a network. They stay on, as a compiled network keeps the hooks that it was traced with.

    Args:
        network: any network.
        layers: which activations, in the order in which `run` returns them.
    """

    def __init__(self, network: nn.Module, layers: Sequence[TracedLayer]) -> None:
        self._network = network
        self._layers = tuple(layers)
        self._taps = [_Tap(layer) for layer in layers]
        self._handles = [
            network.get_submodule(layer.activation.module).register_forward_hook(tap)
            for layer, tap in zip(layers, self._taps, strict=True)
        ]

    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the network on (n, c, h, w) images: its output, and the activations of the layers.

        Raises:
            NetworkError: a layer was not called.
        """
        for tap in self._taps:
            tap.open, tap.seen = True, []
        try:
            output: Tensor = self._network(images)
            taken = []
            for layer, tap in zip(self._layers, self._taps, strict=True):
                if len(tap.seen) <= layer.activation.call:
                    raise NetworkError(f"Every forward pass must call the layer {layer.name!r}, but one did not.")
                taken.append(tap.seen[layer.activation.call])
            return output, taken
        finally:
            for tap in self._taps:
                tap.open, tap.seen = False, []

    def keep_copies(self) -> None:
        """Copy activations when they are taken: for a network that changes one of them in place later on."""
        for tap in self._taps:
            tap.copies = True

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def changed_in_place(network: nn.Module, layers: Sequence[TracedLayer], images: Tensor) -> bool:
    """Whether the network writes over an activation of these layers after its module has put it out.

    Args:
        network: any network; it keeps its running statistics only in evaluation mode.
        layers: which activations.
        images: (n, c, h, w), on the network's device.
    """
    taps = Taps(network, layers)
    versions: list[tuple[Tensor, int]] = []
    for tap in taps._taps:
        tap.versions = versions
    try:
        with torch.enable_grad():
            taps.run(images)
        return any(tensor._version != version for tensor, version in versions)
    finally:
        taps.remove()


class _Tap:
    """The hook of one layer. An object, not a closure: a copied network gets a copy, and fills that one."""

    def __init__(self, layer: TracedLayer) -> None:
        self._path = layer.activation.output
        self.open = False
        self.copies = False
        self.seen: list[Tensor] = []
        self.versions: list[tuple[Tensor, int]] | None = None

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self.open:
            return
        tensor = output if isinstance(output, Tensor) else dict(tensors_in(output))[self._path]
        if self.versions is not None:
            self.versions.append((tensor, tensor._version))
        self.seen.append(tensor.clone() if self.copies else tensor)
