"""Activations of a network in training, taken with autograd by hooks that stay on from pass to pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.logits import log_further_outputs, logits_of
from cka_probe.activations.modules import module_at
from cka_probe.activations.trace import TracedLayer
from cka_probe.errors import NetworkError


class Taps:
    """Taps on layers of a network. They stay on, as a compiled network keeps the hooks that it was traced with.

    Args:
        network: any network.
        layers: which activations, in the order in which `run` returns them.
        name: of the network, for messages.
        compiled: run it compiled where it is; else as plain Python.
        classes: of its logits: any number where None, and 0 where its output is not looked at.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[TracedLayer],
        *,
        name: str = "network",
        compiled: bool = False,
        classes: int | None = None,
    ) -> None:
        self._network = network
        self._classes = classes
        self._name = name
        self._compiled = compiled
        self._layers = tuple(layers)
        self._taps = [_Tap(layer) for layer in layers]
        self._handles = [
            module_at(network, layer.activation.module).register_forward_hook(tap)
            for layer, tap in zip(layers, self._taps, strict=True)
        ]

    def run(
        self, images: Tensor, place: str = "in training", key: tuple[int, ...] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the network on (n, c, h, w) images: its logits (n, classes), and the activations of the layers.

        Args:
            images: the network gets a copy.
            place: for messages: ``"in epoch 2, step 5 of 11"``.
            key: as for `run_network`.

        Raises:
            NetworkError: it raises, does not call a layer, or puts out something else than logits.
        """
        for tap in self._taps:
            tap.open, tap.seen = True, []
        try:
            doing = f"{self._name!r} must run on every batch, but {place} it"
            output = run_network(self._network, images, doing, key=key, eager=not self._compiled)
            taken = []
            for layer, tap in zip(self._layers, self._taps, strict=True):
                if len(tap.seen) <= layer.activation.call:
                    raise NetworkError(
                        f"Every forward pass of {self._name!r} must call the layer {layer.name!r}, but the one {place} "
                        "did not."
                    )
                activation = tap.seen[layer.activation.call]
                if activation.shape[layer.layout.batch_axis] != layer.layout.parts * len(images):
                    raise NetworkError(
                        f"The layer {layer.name!r} of {self._name!r} must put out an activation of each of the "
                        f"{len(images)} images, but {place} put out one of shape {tuple(activation.shape)}."
                    )
                taken.append(activation)
            if self._classes == 0:
                return images.new_zeros(len(images), 0), taken
            logits = logits_of(output, len(images), self._name, place, self._classes)
            log_further_outputs(self._network, output, self._name)
            return logits, taken
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


def changed_in_place(network: nn.Module, layers: Sequence[TracedLayer], images: Tensor, name: str = "network") -> bool:
    """Whether the network writes over an activation of these layers after its module has put it out.

    Args:
        network: any network; it keeps its running statistics only in evaluation mode.
        layers: which activations.
        images: (n, c, h, w), on the network's device.
        name: of the network, for messages.
    """
    taps = Taps(network, layers, name=name, classes=0)
    versions: list[tuple[Tensor, int]] = []
    for tap in taps._taps:
        tap.versions = versions
    try:
        with torch.enable_grad():
            taps.run(images, "in its dry run", key=(0,))
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
