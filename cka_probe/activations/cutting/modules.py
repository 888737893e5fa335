"""The two modules that a network is cut into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cka_probe.activations.cutting.graphs import Crossing
from cka_probe.activations.cutting.recordings import Recording, Recordings
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.modules import module_at, modules_of
from cka_probe.errors import NetworkError


class _Shared(nn.Module):
    """Holds some of a module's children and tensors, under their names, and shares its training flag."""

    _owner: tuple[nn.Module]  # in a tuple, so that it is no child

    def __init__(self, owner: nn.Module) -> None:
        training = owner.training
        self.__dict__["_owner"] = (owner,)
        super().__init__()
        owner.training = training

    @property
    def training(self) -> bool:
        """The owner's flag."""
        return self._owner[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        self._owner[0].training = mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Shared:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for own, shared in self._stores():
            shared.update({name: tensor for name, tensor in own.items() if name in shared})
        return self

    def share(self, name: str) -> None:
        """Hold a tensor of the owner's; once more after it was replaced there."""
        for own, theirs in self._stores():
            if name in theirs:
                if own.get(name) is not theirs[name]:
                    own[name] = theirs[name]
                return
        self.__dict__[name] = self._owner[0].__dict__[name]

    def _stores(self) -> tuple[tuple[dict[str, Any], dict[str, Any]], ...]:
        (owner,) = self._owner
        return (self._parameters, owner._parameters), (self._buffers, owner._buffers)


class Segment(_Shared):
    """A part of a network's forward pass."""

    _number: int
    _recordings: Recordings
    _tensors: list[tuple[_Shared, str]]
    _adopted: list[Recording]

    def __init__(self, recordings: Recordings) -> None:
        super().__init__(recordings.network)
        self.__dict__["_recordings"] = recordings
        self.__dict__["_tensors"] = []
        self.__dict__["_adopted"] = []
        for recording in recordings.known:
            self._adopt(recording)

    def shares_changed_values(self) -> bool:
        """Whether the tail changes a value in place that crosses the cut."""
        return any(self._current().changed)

    def _current(self) -> Recording:
        """The recording of the network as it is, whose modules and tensors are at their places here."""
        recording: Recording = self._recordings.current()
        if recording not in self._adopted:
            self._adopt(recording)
        for holder, name in self._tensors:
            holder.share(name)
        return recording

    def _adopt(self, recording: Recording) -> None:
        network = self._recordings.network
        modules = modules_of(network)
        order = {path: place for place, path in enumerate(modules)}
        paths = recording.paths[self._number]
        called = {(module, name): child for module, name, child in recording.children}
        for path in sorted(paths, key=lambda path: order.get(path, order.get(path.rpartition(".")[0], -1))):
            if path in recording.constants:
                self.register_buffer(path, recording.constants[path], persistent=False)
                continue
            above, _, name = path.rpartition(".")
            holder = self._holder(above)
            if not isinstance(holder, _Shared):
                continue  # inside a module that is here as a whole
            owner = module_at(network, above)
            if path in modules and (owner, name) in called:
                holder._modules[name] = called[owner, name]
            else:
                holder.share(name)
                if (holder, name) not in self._tensors:
                    self._tensors.append((holder, name))
        kept = [known for known in self._adopted if known in self._recordings.known]
        self.__dict__["_adopted"] = [*kept, recording]

    def _holder(self, path: str) -> nn.Module:
        holder: nn.Module = self
        for name in path.split(".") if path else ():
            if not isinstance(holder, _Shared):
                break
            if name not in holder._modules:
                holder._modules[name] = _Shared(module_at(holder._owner[0], name))
            holder = holder._modules[name]  # type: ignore[assignment]
        return holder


class Head(Segment):
    """A network up to a stage: images (n, c, h, w) -> the stage's activation, or a `Crossing`."""

    _number = 0

    def forward(self, images: Tensor) -> Any:
        """Run the network up to the stage."""
        return self._current().head(self, images)


class Tail(Segment):
    """A network from a stage on: the stage's activation, or a `Crossing` -> the network's output."""

    _number = 1

    def forward(self, activation: Any) -> Any:
        """Run the network from the stage on; the activation is not changed.

        Raises:
            NetworkError: an activation alone is not enough, or is not of the example's shape where it must be.
        """
        recording = self._current()
        if isinstance(activation, Crossing):
            activation, rest = activation
        else:
            rest = _filled(recording, activation, len(self._recordings.example)) if recording.rest else ()
        values = [
            pytree.tree_map_only(Tensor, torch.clone, value) if changed else value
            for value, changed in zip((activation, *rest), recording.changed, strict=True)
        ]
        return recording.tail(self, *values)


def _filled(recording: Recording, activation: Any, count: int) -> tuple[Any, ...]:
    """The values that cross beside an activation, where they follow from its batch size."""
    shapes = [tensor.shape for _, tensor in tensors_in(activation)]
    known = recording.shapes
    if [shape[1:] for shape in shapes] != [shape[1:] for shape in known]:
        raise NetworkError(
            f"The tail needs sizes as well, which are known for activations of shape {tuple(known[0])} alone, but "
            f"got {tuple(shapes[0]) if shapes else 'no tensor'}. Give it all that the head returns, or cut "
            "on images of the size that makes this shape."
        )
    size = shapes[0][0] * count // known[0][0]
    return tuple(_value(small, large, (count, size), activation) for small, large in recording.rest)


def _value(small: Any, large: Any, sizes: tuple[int, int], activation: Any) -> Any:
    """A value for a batch, from those of the example and of one image more."""
    count, size = sizes
    if isinstance(small, torch.device):
        return next(tensor.device for _, tensor in tensors_in(activation))
    if small is not None and small == large:
        return small
    if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
        values = [_value(one, other, sizes, activation) for one, other in zip(small, large, strict=True)]
        return type(small)(values)
    if isinstance(small, int) and isinstance(large, int) and small * (count + 1) == large * count:
        return small * size // count
    raise NetworkError(
        "The tail needs more than the activation: a value that the head computes from the images crosses the cut too. "
        "Give it all that the head returns."
    )
