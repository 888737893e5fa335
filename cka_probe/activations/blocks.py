"""The residual, attention or mixer blocks of any network, found by its structure alone.

Networks are built as sequences of like units: ``layer1`` to ``layer4`` of a ResNet hold bottlenecks, ``blocks`` of a
ViT holds transformer blocks, the stages of a Swin hold sequences of blocks. No names are looked at:

* A *unit* is a module that has at least two *dense* weight layers (convolutions that mix channels, linear and
  recurrent ones; depthwise convolutions and norms do not count), and is no sequence of units.
* A *sequence of units* is an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` that holds a unit and in which
  at most half of the elements with weights are smaller. The other sequences are parts of blocks: one
  squeeze-excitation unit among three convolutions is a part of an inverted residual.
* The blocks are the elements of those sequences that have at least two weight layers of any kind. An element with one
  is a block where more than half of the elements of its class have two (the first of EfficientNetV2).
* A sequence in a sequence is a stage: its elements count as those of the outer one, a bare layer that it starts with
  aside.
* Another element may be a *stage*, too: the sequences inside the elements of its class hold more than half of the
  parameters of these elements, in blocks of their own, and there is no element of the class without such blocks. A
  stage is replaced by its blocks, once: the parts of a block may be sequences too. Where some stages of a class have
  further sequences below a child that others lack, those are their downsampling, not blocks.

Sequences in which each element with weights is a module with children come first; one with bare layers beside its
units (SqueezeNet) is tried after them. A network without such sequences has its blocks as plain attributes
(Xception), has no dense pairs (ConvMixer), or has no blocks at all (VGG, a plain MLP), for which its weight layers
stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator

import torch
from torch import nn

from cka_probe.activations.modules import children_of, module_at, modules_of

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
_QUANTIZED = {"WeightedQuantizedModule", "RNNBase", "RNNCellBase"}  # of torch.ao, which PyTorch is to lose
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)

Test = Callable[[nn.Module], bool]


def find_blocks(network: nn.Module, called: Container[str]) -> list[str]:
    """The paths of the network's blocks.

    Args:
        network: any network.
        called: paths of the modules that put out something in a forward pass; no others are returned.

    Returns:
        Paths in the order of definition; empty where no module with weights is called.
    """
    searches: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _in_sequences(network, "", _is_unit, _is_pure),
        lambda: _in_sequences(network, "", _is_unit, _is_mixed),
        lambda: _as_attributes(network, ""),
        lambda: _in_sequences(network, "", _has_two_weights, _is_pure),
        lambda: _weight_layers(network, ""),
    )
    for search in searches:
        found = [name for name in search() if name in called]
        if found:
            return found
    return []


def _in_sequences(module: nn.Module, path: str, is_unit: Test, is_sequence: Test, stages: int = 1) -> Iterator[str]:
    """Blocks in the sequences of units below ``module``, those inside ``stages`` levels of elements looked through."""
    for name, child in children_of(module).items():
        below = _join(path, name)
        elements = dict(_elements(child, below)) if is_sequence(child) else {}
        if not _holds_units(elements.values(), is_unit):
            yield from _in_sequences(child, below, is_unit, is_sequence, stages)
            continue
        blocks: dict[str, list[str]] = {}
        for alike in _by_class(elements):
            inside = _shared(
                {
                    element_path: list(_in_sequences(element, element_path, is_unit, is_sequence, stages - 1))
                    for element_path, element in alike.items()
                    if stages and element_path.rpartition(".")[0] == below  # else the nested sequence is the stage
                }
            )
            within = [block for found in inside.values() for block in found]
            is_stage = inside.keys() == alike.keys() and all(inside.values())
            if is_stage and 2 * _size(module, path, within) > _size(module, path, list(alike)):
                blocks |= inside
            else:
                blocks |= {element_path: [element_path] for element_path in _large(alike)}
        for element_path in elements:
            yield from blocks.get(element_path, [])


def _shared(inside: dict[str, list[str]]) -> dict[str, list[str]]:
    """The blocks inside elements of one class, where it may be without those below children that only some have.

    These are the downsampling before a stage, which the first stage lacks.
    """
    children = {path: {block[len(path) + 1 :].partition(".")[0] for block in blocks} for path, blocks in inside.items()}
    shared = set.intersection(*children.values()) if children else set()
    return {
        path: [block for block in blocks if not shared or block[len(path) + 1 :].partition(".")[0] in shared]
        for path, blocks in inside.items()
    }


def _holds_units(elements: Collection[nn.Module], is_unit: Test) -> bool:
    """Whether a sequence of these elements holds a unit, and smaller elements are at most half of those with weights.

    Otherwise its units are parts of a block.
    """
    weighted = [element for element in elements if _weights(element)]
    smaller = sum(not _has_two_weights(element) for element in weighted)
    return 2 * smaller <= len(weighted) and any(map(is_unit, weighted))


def _by_class(elements: dict[str, nn.Module]) -> Iterable[dict[str, nn.Module]]:
    """The elements with weights, those of one class together; a bare container is like no other."""
    groups: dict[object, dict[str, nn.Module]] = {}
    for path, element in elements.items():
        if _weights(element):
            groups.setdefault(path if type(element) in _SEQUENCES else type(element), {})[path] = element
    return groups.values()


def _large(alike: dict[str, nn.Module]) -> list[str]:
    """The paths of the elements with two weight layers; all of a class of which more than half have two."""
    large = [path for path, element in alike.items() if _has_two_weights(element)]
    return list(alike) if 2 * len(large) > len(alike) else large


def _as_attributes(module: nn.Module, path: str) -> Iterator[str]:
    """The units among the children of the outermost module that has two or more of them."""
    units = [
        (name, child)
        for name, child in children_of(module).items()
        if _is_unit(child) and not isinstance(child, _SEQUENCES)
    ]
    if len(units) == 1:
        name, child = units[0]
        yield from _as_attributes(child, _join(path, name))
        return
    for name, unit in units:
        # A stage may hold its blocks as attributes too (RegNet): then all that has weights in it is of one class.
        inside = [(inner, child) for inner, child in children_of(unit).items() if _weights(child)]
        is_stage = len({type(child) for _, child in inside}) == 1 and all(
            _is_unit(child) and not isinstance(child, _SEQUENCES) for _, child in inside
        )
        below = _join(path, name)
        yield from (_join(below, inner) for inner, _ in inside) if is_stage else [below]


def _weight_layers(module: nn.Module, path: str) -> Iterator[str]:
    """The convolutions and linear layers, each with the norm and activation that its own module adds."""
    if path and len(_weights(module)) == 1 and not isinstance(module, _SEQUENCES):
        yield path
        return
    for name, child in children_of(module).items():
        yield from _weight_layers(child, _join(path, name))


def _elements(sequence: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The elements of a sequence and of the sequences in it that are pure or hold several units."""
    for name, child in children_of(sequence).items():
        if _is_pure(child) or _is_mixed_stage(child):
            yield from _elements(child, _join(path, name))
        else:
            yield _join(path, name), child


def _is_pure(module: nn.Module) -> bool:
    """Whether a module is a sequence of modules with children: not a list of bare layers with their activations."""
    if not isinstance(module, _SEQUENCES):
        return False
    weighted = [
        child for child in children_of(module).values() if _weights(child) or any(True for _ in child.parameters())
    ]
    return bool(weighted) and all(bool(children_of(child)) for child in weighted)


def _is_mixed(module: nn.Module) -> bool:
    return isinstance(module, _SEQUENCES)


def _is_mixed_stage(module: nn.Module) -> bool:
    """Whether a bare container holds a bare layer, such as its downsampling, before several units."""
    elements = children_of(module).values() if type(module) in _SEQUENCES else []
    return sum(map(_is_unit, elements)) > 1 and _holds_units(elements, _is_unit)


def _is_unit(module: nn.Module) -> bool:
    return sum(not _is_depthwise(layer) for layer in _weights(module)) >= 2


def _has_two_weights(module: nn.Module) -> bool:
    return len(_weights(module)) >= 2


def _weights(module: nn.Module) -> list[nn.Module]:
    """The weight layers in a module, itself included; what a weight layer is made of is none of them."""
    layers: dict[str, nn.Module] = {}
    within: tuple[str, ...] = ()
    for path, inner in modules_of(module).items():
        if _is_weight_layer(inner) and not path.startswith(within):
            layers[path] = inner
            if not isinstance(inner, nn.MultiheadAttention):  # its output projection counts
                within += (_join(path, ""),)
    return list(layers.values())


def _is_weight_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's, or a user's own: childless, with a matrix among its tensors.

    The tensors of a parametrized layer are among its children. Weights that are quantized to integers may be buffers.
    """
    if isinstance(module, _WEIGHT_LAYERS) or _is_quantized(module):
        return True
    if set(children_of(module)) - {"parametrizations"}:
        return False
    return any(tensor.squeeze().ndim >= 2 for tensor in (*module.parameters(), *_packed(module)))


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized linear layer, convolution or recurrent layer of `torch.ao`."""
    return any(
        base.__name__ in _QUANTIZED and base.__module__.startswith("torch.ao.nn.quantized")
        for base in type(module).__mro__
    )


def _packed(module: nn.Module) -> list[torch.Tensor]:
    """The buffers of a module that hold integer weights; int64 is the type of indices."""
    return [buffer for buffer in module.buffers(recurse=False) if buffer.dtype in _PACKED]


def _size(root: nn.Module, path: str, below: list[str]) -> int:
    """How many weights lie in the modules with the paths ``below``, where ``root`` has the path ``path``."""
    modules = [module_at(root, name[len(path) + 1 :] if path else name) for name in below]
    tensors: set[torch.Tensor] = {parameter for module in modules for parameter in module.parameters()}
    layers = {layer for module in modules for layer in _weights(module)}
    tensors.update(buffer for layer in layers for buffer in _packed(layer))
    unpack = [getattr(layer, "weight", None) for layer in layers if _is_quantized(layer)]
    tensors.update(weight() for weight in unpack if callable(weight))
    return sum(map(torch.numel, tensors))


def _is_depthwise(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) > 1


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
