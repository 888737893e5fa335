"""The residual, attention or mixer blocks of any network, found by its structure alone.

Networks are built as sequences of like units: ``layer1`` to ``layer4`` of a ResNet hold bottlenecks, ``blocks`` of a
ViT holds transformer blocks, the stages of a Swin hold sequences of blocks. No names are looked at:

* A *sequence* is an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict``. It is *pure* where each element that
  has weights is a module with children, or a pure sequence: not a list of bare layers with their activations.
* A *unit* is a module that is no pure sequence and has at least two *dense* weight layers (convolutions that mix
  channels, linear and recurrent ones; depthwise convolutions and norms do not count).
* The blocks are the elements with at least two weight layers of any kind in the pure sequences that hold a unit.
  Where the sequences inside the elements hold more than half of their parameters, in blocks of their own, the
  elements are *stages*, replaced by those blocks, once: the parts of a block may be sequences too.

A network without such sequences has its blocks as plain attributes (Xception), has no dense pairs (ConvMixer), or has
no blocks at all (VGG, a plain MLP), for which its weight layers stand in. The rules are tried in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import nn

from cka_probe.activations.modules import children_of, module_at, modules_of

_SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)

Unit = Callable[[nn.Module], bool]


def find_blocks(network: nn.Module, called: Container[str]) -> list[str]:
    """The paths of the network's blocks.

    Args:
        network: any network.
        called: paths of the modules that put out something in a forward pass; no others are returned.

    Returns:
        Paths in the order of definition; empty where no module with weights is called.
    """
    searches: tuple[Callable[[], Iterator[str]], ...] = (
        lambda: _in_sequences(network, "", _is_unit),
        lambda: _as_attributes(network, ""),
        lambda: _in_sequences(network, "", _has_two_weights),
        lambda: _weight_layers(network, ""),
    )
    for search in searches:
        found = [name for name in search() if name in called]
        if found:
            return found
    return []


def _in_sequences(module: nn.Module, path: str, is_unit: Unit, stages: int = 1) -> Iterator[str]:
    """Blocks in the pure sequences below ``module``, those inside ``stages`` levels of elements looked through."""
    for name, child in children_of(module).items():
        below = _join(path, name)
        elements = dict(_elements(child, below)) if _is_pure(child) else {}
        if not any(is_unit(element) for element in elements.values()):
            yield from _in_sequences(child, below, is_unit, stages)
            continue
        inside = {
            element_path: list(_in_sequences(element, element_path, is_unit, stages - 1)) if stages else []
            for element_path, element in elements.items()
        }
        through = 2 * _parameters(
            module, path, [block for blocks in inside.values() for block in blocks]
        ) > _parameters(module, path, list(elements))
        for element_path, element in elements.items():
            if through and inside[element_path]:
                yield from inside[element_path]
            elif _has_two_weights(element):
                yield element_path


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
    """The elements of a pure sequence and of the pure sequences in it."""
    for name, child in children_of(sequence).items():
        if _is_pure(child):
            yield from _elements(child, _join(path, name))
        else:
            yield _join(path, name), child


def _is_pure(module: nn.Module) -> bool:
    if not isinstance(module, _SEQUENCES):
        return False
    weighted = [child for child in children_of(module).values() if any(True for _ in child.parameters())]
    return bool(weighted) and all(bool(children_of(child)) for child in weighted)


def _is_unit(module: nn.Module) -> bool:
    return sum(not _is_depthwise(layer) for layer in _weights(module)) >= 2


def _has_two_weights(module: nn.Module) -> bool:
    return len(_weights(module)) >= 2


def _weights(module: nn.Module) -> list[nn.Module]:
    """The weight layers in a module, itself included."""
    return [layer for layer in modules_of(module).values() if _is_weight_layer(layer)]


def _is_weight_layer(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's, or a user's own: childless, with a matrix among its parameters."""
    if isinstance(module, _WEIGHT_LAYERS):
        return True
    childless = not children_of(module)
    return childless and any(parameter.squeeze().ndim >= 2 for parameter in module.parameters(recurse=False))


def _parameters(root: nn.Module, path: str, below: list[str]) -> int:
    """How many parameters lie in the modules with the paths ``below``, where ``root`` has the path ``path``."""
    modules = [module_at(root, name[len(path) + 1 :] if path else name) for name in below]
    return sum(map(torch.numel, {parameter for module in modules for parameter in module.parameters()}))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
