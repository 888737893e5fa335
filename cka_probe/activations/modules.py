"""The modules of a network by their paths, without the wrappers of ``torch.compile`` and of data parallelism."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn


def unwrapped(network: nn.Module) -> nn.Module:
    """The network that a compiled or a data-parallel one wraps; any other is returned as it is."""
    while True:
        name = _wrapped_as(network)
        if name is None:
            return network
        network = network._modules[name]  # type: ignore[assignment]  # a wrapper always holds its network


def modules_of(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, each module once under its first path, as `nn.Module.named_modules` orders them."""
    found: dict[str, nn.Module] = {}
    known: set[nn.Module] = set()
    for path, module in _walk(unwrapped(network), "", ()):
        if module not in known:
            known.add(module)
            found[path] = module
    return found


def second_paths(network: nn.Module) -> dict[str, str]:
    """Each further path of a module that is registered more than once -> its first path."""
    first: dict[nn.Module, str] = {}
    again: dict[str, str] = {}
    for path, module in _walk(unwrapped(network), "", ()):
        if first.setdefault(module, path) != path:
            again[path] = first[module]
    return again


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> child, wrappers looked through; a child that is registered twice is there once."""
    children: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if child is not None and unwrapped(child) not in children.values():
            children[name] = unwrapped(child)
    return children


def module_at(network: nn.Module, path: str) -> nn.Module:
    """The module with a path as `modules_of` gives it.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(network)
    for name in path.split(".") if path else ():
        module = unwrapped(module.get_submodule(name))
    return module


def is_exported(network: nn.Module) -> bool:
    """Whether this is the module of a program of `torch.export`."""
    return any(kind.__name__ == "_StatefulGraphModule" for kind in type(network).__mro__)


def _walk(module: nn.Module, path: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    """All paths of all modules; one that holds itself is not followed for ever."""
    yield path, module
    for name, child in module._modules.items():
        inner = unwrapped(child) if child is not None else None
        if inner is not None and inner is not module and inner not in above:
            yield from _walk(inner, f"{path}.{name}" if path else name, (*above, module))


def _wrapped_as(network: nn.Module) -> str | None:
    """The name under which a wrapper holds its network; None where the module is no wrapper."""
    dynamo = sys.modules.get("torch._dynamo")  # to import it takes seconds, and before that nothing is compiled
    if dynamo is not None and isinstance(network, dynamo.OptimizedModule):
        return "_orig_mod"
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return None
