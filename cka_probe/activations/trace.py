"""A dry run of a network on a few images: which activations it has, in which order, shape and layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from cka_probe.activations.features import Layout, Prefix, infer_layout
from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import Activation, Latest, capture
from cka_probe.activations.modules import modules_of, second_paths
from cka_probe.errors import NetworkError
from cka_probe.runtime.user_code import naming_errors

DRY_RUN_IMAGES = 3

_KEY = (0,)
"""Of the random numbers of a dry run: both of its passes must give the same values."""


@dataclass(frozen=True)
class TracedLayer:
    """An activation of the network that can be compared.

    Attributes:
        name: its label: the path of the module; ``act[1]`` for the second call of a module that is called several
            times, ``rnn:0`` for the first tensor of a module that puts out several.
        activation: which tensor of a forward pass it is.
        kind: the class of the module.
        shape: of the activation for one image, without the batch axis.
        layout: how its features are found.
        alias: whether it is the very tensor that the traced layer before it put out (a container returning what its
            last child returned).
    """

    name: str
    activation: Activation
    kind: str
    shape: tuple[int, ...]
    layout: Layout
    alias: bool


@dataclass(frozen=True)
class Trace:
    """What a dry run saw.

    Attributes:
        layers: the activations that can be compared, in the order in which their modules finished.
        left_out: module path -> why none of its activations can be compared.
        calls: module path -> how often it is called in a forward pass.
        image_size: (height, width) of its images.
        frames: of its videos; 0 for images.
    """

    layers: tuple[TracedLayer, ...]
    left_out: dict[str, str]
    calls: Mapping[str, int] = field(default_factory=dict)
    image_size: tuple[int, int] = (0, 0)
    frames: int = 0


def put_out_again(traced: Trace, chosen: Sequence[TracedLayer]) -> set[Activation]:
    """Those of the chosen layers, in forward order, whose very tensor the next chosen layer puts out too."""
    position = {layer: index for index, layer in enumerate(traced.layers)}
    again = set()
    for layer, following in pairwise(chosen):
        between = traced.layers[position[layer] + 1 : position[following] + 1]
        if all(container.alias for container in between):
            again.add(layer.activation)
    return again


@dataclass
class _Observed:
    """One activation of one dry run; its values only where several parts of an example share the batch axis."""

    shape: tuple[int, ...]
    floating: bool
    alias: bool
    values: Tensor | None


def trace(network: nn.Module, images: Tensor) -> Trace:
    """Run the network on the first two images and on all three, and compare the shapes.

    Two batch sizes show what one cannot: which axis is that of the examples, and how many windows or patches of one
    image share it.

    Args:
        network: in evaluation mode, autograd off.
        images: (3, c, h, w), or videos (3, c, t, h, w), on the network's device.

    Raises:
        NetworkError: the network cannot run on them.
    """
    assert len(images) == DRY_RUN_IMAGES
    with naming_errors("Its modules must be known, but to list them raised"):
        modules = modules_of(network)
    unseen = [name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule)]
    if "" in unseen:
        raise NetworkError(
            "It is a TorchScript module, whose layers cannot be observed. Use the network it was made from."
        )
    hooked = [name for name in modules if name not in unseen]
    small, large = (_run(network, images[:count], hooked) for count in (DRY_RUN_IMAGES - 1, DRY_RUN_IMAGES))
    prefix = prefix_of(network)
    channels_last = _channels_last(network)
    calls: dict[str, set[int]] = defaultdict(set)
    outputs: dict[str, set[str]] = defaultdict(set)
    usable, left_out = [], dict.fromkeys(set(modules) - {which.module for which in small}, "never called")
    left_out |= dict.fromkeys(unseen, "a TorchScript module, whose layers cannot be observed")
    for which, seen in small.items():
        other = large.get(which)
        if not seen.floating:
            left_out[which.module] = "its output is not floating-point"
            continue
        layout = None
        if other is not None:
            layout = infer_layout(
                seen.shape,
                other.shape,
                image_size=tuple(images.shape[-3:] if images.ndim == 5 else images.shape[-2:]),
                prefix=prefix,
                channels_last=channels_last,
            )
            layout = layout and _ordered(layout, seen.values, other.values)
        if layout is None:
            left_out[which.module] = "its output does not have the examples along one axis"
            continue
        usable.append((which, seen, layout))
        calls[which.module].add(which.call)
        outputs[which.module].add(which.output)
    layers = []
    for which, seen, layout in usable:
        name = which.module
        name += f"[{which.call}]" if len(calls[which.module]) > 1 else ""
        name += f":{which.output}" if len(outputs[which.module]) > 1 else ""
        shape = tuple(size for axis, size in enumerate(seen.shape) if axis != layout.batch_axis)
        shape = (layout.parts, *shape) if layout.parts > 1 else shape
        layers.append(TracedLayer(name, which, type(modules[which.module]).__name__, shape, layout, seen.alias))
        left_out.pop(which.module, None)
    again = {path: f"the same module as {first!r}" for path, first in second_paths(network).items()}
    silent = (nn.ModuleList, nn.ModuleDict)  # they have no output of their own
    return Trace(
        tuple(layers),
        {
            name: left_out[name]
            for name, module in modules.items()
            if name in left_out and not isinstance(module, silent)
        }
        | again,
        {which.module: which.call + 1 for which in small},  # the last of its calls comes last
        (images.shape[-2], images.shape[-1]),
        images.shape[-3] if images.ndim == 5 else 0,
    )


def _run(network: nn.Module, images: Tensor, modules: Sequence[str]) -> dict[Activation, _Observed]:
    seen: dict[Activation, _Observed] = {}
    latest = Latest()

    def receive(which: Activation, tensor: Tensor) -> None:
        shared_axis = tensor.ndim > 0 and tensor.shape[0] > len(images) and tensor.shape[0] % len(images) == 0
        keep = shared_axis and tensor.is_floating_point()
        alias = latest.holds(tensor)
        latest.hold(tensor)
        values = tensor.clone() if keep else None
        seen[which] = _Observed(tuple(tensor.shape), tensor.is_floating_point(), alias, values)

    doing = f"It must run on images of shape {tuple(images.shape[1:])}, but"
    with capture(network, modules, receive):
        run_network(network, images, doing, key=_KEY)
    return seen


def _ordered(layout: Layout, small: Tensor | None, large: Tensor | None) -> Layout | None:
    """The layout with the order of the parts that share the batch axis, found by comparing the two runs' values."""
    if layout.parts == 1:
        return layout
    if layout.batch_axis != 0 or small is None or large is None:
        return None
    few, many = DRY_RUN_IMAGES - 1, DRY_RUN_IMAGES
    shape = small.shape[1:]
    if _equal(small, large[: len(small)]):
        return layout
    if _equal(small.view(layout.parts, few, *shape), large.view(layout.parts, many, *shape)[:, :few]):
        return replace(layout, parts_first=True)
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    """Up to the round-off of computing with another batch size."""
    difference = (first.double() - second.double()).nan_to_num().norm()
    return bool(difference <= 1e-2 * first.double().nan_to_num().norm())


_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_embedding", "dist_token", "distillation_token")
_REGISTERS = ("reg_token", "reg_tokens", "register_token", "register_tokens", "storage_tokens")


def prefix_of(network: nn.Module) -> Prefix:
    """The class and register tokens that the network puts before its patch tokens, as far as it says.

    timm's networks say how many there are; others by the names of their parameters, of shape (c,), (k, c) or (1, k, c).
    """
    counts = [0, 0]
    for name, parameter in network.named_parameters():
        own = name.rpartition(".")[2]
        kind = 0 if own in _CLASS_TOKENS else 1 if own in _REGISTERS else None
        if kind is not None and 1 <= parameter.ndim <= 3:
            counts[kind] += 1 if parameter.ndim == 1 else parameter.shape[-2]
    for module in network.modules():
        count = getattr(module, "num_prefix_tokens", None)
        if isinstance(count, int) and count >= 0:
            registers = min(counts[1], count)
            return Prefix(count - registers, registers)
    return Prefix(*counts)


def _channels_last(network: nn.Module) -> bool:
    """Whether the network says that its maps are (n, h, w, c), as timm's Swin does."""
    return any(getattr(module, "output_fmt", None) == "NHWC" for module in network.modules())
