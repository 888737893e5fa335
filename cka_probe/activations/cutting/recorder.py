"""A forward pass recorded as a graph: torch.fx, with the values of one batch at hand while it traces.

Plain torch.fx knows no values, so that it fails where Python asks for one (``if h % 2``, ``range(h)``, ``*sizes``),
and takes the wrong branch in silence where it cannot fail (``isinstance(x, tuple)``, ``mask is None``). Here each
recorded value carries what it was for the batch. What Python asks of a shape is answered, and the graph gets a guard
that raises where a later batch would answer differently; what it asks of an activation is refused.
"""

from __future__ import annotations

import builtins
import operator
import random
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from cka_probe.activations.cutting.recorded import PLAIN, QUESTIONS, Recorded, expect, holds_tensor, is_plain
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.modules import module_at, modules_of, unwrapped
from cka_probe.errors import NetworkError
from cka_probe.runtime.user_code import current_modes

Read = tuple[nn.Module, str, Any]
"""(module, attribute, value) that a forward pass read."""

_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")
_MODULE_S_OWN = set(vars(nn.Module())) - {"training"}
_OF_SHAPE = {
    "shape", "size", "dim", "ndim", "numel", "nelement", "stride", "dtype", "device", "layout", "is_contiguous",
    "is_floating_point", "is_complex", "is_cuda", "is_sparse", "is_quantized", "is_tensor", "requires_grad",
    "get_device", "element_size", "ndimension", "len", "type", "is_nested", "is_mkldnn", "is_meta", "has_names",
    "is_leaf", "is_cpu",
}  # fmt: skip


class Recorder(fx.Tracer):
    """Records one forward pass of a network on a batch, which it runs at the same time.

    Args:
        network: any network, without wrappers.
        through: the modules whose own forward pass is recorded; each other one that they call is a node.
        images: (n, c, h, w), on the network's device.

    Attributes:
        values: what each node was for the batch.
        reads: module and name -> value of the plain attributes (flags, numbers, text) that the pass has read.
        impure: nodes that drew random numbers or changed a tensor in place.
        changed: nodes whose values were changed in place afterwards.
        derived: nodes whose values are numbers that were computed from activations.
        called: path of each module that is a node -> the module.
        calls: path of a module -> its nodes.
        constants: name -> a tensor that belongs to no module.
    """

    proxy_buffer_attributes = True

    def __init__(self, network: nn.Module, through: Collection[nn.Module], images: Tensor) -> None:
        super().__init__()
        self.network = network
        self.images = images
        self.values: dict[fx.Node, Any] = {}
        self.reads: dict[tuple[nn.Module, str], Any] = {}
        self.impure: set[fx.Node] = set()
        self.changed: set[fx.Node] = set()
        self.derived: set[fx.Node] = set()
        self.called: dict[str, nn.Module] = {}
        self.calls: dict[str, list[fx.Node]] = {}
        self._through = set(through)
        self._paths = {module: path for path, module in modules_of(network).items()}
        self._tensors: dict[int, str] = {}
        self._owners = {path: module for module, path in self._paths.items()}
        for module, path in self._paths.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._tensors.setdefault(id(tensor), f"{path}.{name}" if path else name)
        self._running = False
        self._thread = get_ident()
        self._versions: dict[fx.Node, list[tuple[Tensor, int]]] = {}
        self.constants: dict[str, Tensor] = {}
        self._modes: list[Any] = []
        self._random: tuple[Any, ...] = ()

    def record(self) -> fx.Graph:
        """The graph of the forward pass.

        Raises:
            NetworkError: it does something that a graph cannot repeat.
        """
        self._modes, self._random = current_modes(), _random_state()
        before = {module: _state(module) for module in self._paths}
        try:
            with self._watching():
                graph = self.trace(self.network)
        finally:
            changed = [
                f"{self._paths[module] or type(module).__name__}.{name}"
                for module, state in before.items()
                for name in self._put_back(state, own=module in self._through)
            ]
        if changed:
            raise NetworkError(f"it sets its own attribute {changed[0]!r} in its forward pass")
        self._check_modes()
        for node, versions in self._versions.items():
            if any(tensor._version != version for tensor, version in versions):
                self.changed.add(node)
        return graph

    def path_of(self, path: str) -> str:
        """The first path of a module that may have several."""
        return self._paths[module_at(self.network, path)]

    def owner(self, path: str) -> tuple[nn.Module, str]:
        """The module and the name of a tensor that a node reads, or of a module's place in the module above it."""
        above, _, name = path.rpartition(".")
        return self._owners[above], name

    # What torch.fx calls:

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The batch is the only argument; defaults stay what they are."""
        images = self.create_proxy("placeholder", "images", (), {})
        return lambda images: self.network.forward(images), [images]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A node, unless the module is one to record or was made in passing (a slice of a sequence)."""
        inner = unwrapped(m)
        if self._aside or inner not in self._paths:
            return forward(*args, **kwargs)
        if inner in self._through:
            return inner.forward(*args, **kwargs)
        path = self._paths[inner]
        self.called.setdefault(path, m)
        return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """A node for each parameter and buffer that is read."""
        if self._aside or not isinstance(attr_val, Tensor) or id(attr_val) not in self._tensors:
            return attr_val
        return self.create_proxy("get_attr", self._tensors[id(attr_val)], (), {})

    def create_arg(self, a: Any) -> Any:
        """Tensors that belong to no module become constants; objects with fields are rebuilt."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                self._tensors[id(a)] = self._constant(a)
            return self.create_proxy("get_attr", self._tensors[id(a)], (), {}).node
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_proxy("call_function", type(a), tuple(a), {}).node
        if is_dataclass(a) and not isinstance(a, type):
            values = {field.name: getattr(a, field.name) for field in fields(a)}
            return self.create_proxy("call_function", type(a), (), values).node
        return super().create_arg(a)

    def create_proxy(  # noqa: PLR0913  # as torch.fx has it
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: Any = None,
        type_expr: Any = None, proxy_factory_fn: Any = None,
    ) -> Any:  # fmt: skip
        """Record one operation and run it."""
        self._check_modes()
        if self._random != _random_state():
            raise NetworkError(f"it draws random numbers in a way that cannot be recorded{self._place()}")
        arguments, keywords = self.create_arg(args), self.create_arg(kwargs)
        node = self.create_node(kind, target, arguments, keywords, name, type_expr)
        if kind == "call_module":
            self.calls.setdefault(target, []).append(node)
        inputs = [tensor for source in node.all_input_nodes for _, tensor in tensors_in(self.values[source])]
        versions = [tensor._version for tensor in inputs]
        self._running = True
        try:
            value = self._run(kind, target, self._real(arguments), self._real(keywords))
        finally:
            self._running = False
        self.values[node] = value
        after = _random_state()
        if after != self._random or [tensor._version for tensor in inputs] != versions:
            self.impure.add(node)
        self._random = after
        self._versions[node] = [(tensor, tensor._version) for _, tensor in tensors_in(value)]
        if not holds_tensor(value) and self._is_derived(node, args):
            self.derived.add(node)
        return value if value is None or isinstance(value, str) else Recorded(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer for this batch."""
        return bool(self.answer(obj, "bool"))

    def answer(self, proxy: fx.Proxy, question: str) -> Any:
        """What Python asks of a value, with a guard that a later batch gives the same answer."""
        value = self.values[proxy.node]
        if proxy.node in self.derived or (isinstance(value, Tensor) and question != "len"):
            raise NetworkError(
                f"what it computes depends on the values of an activation, not on shapes alone{self._place()}"
            )
        found = QUESTIONS[question](value)
        if isinstance(value, (*PLAIN, Tensor)):
            guard = self.create_node("call_function", expect, (proxy.node, question, found), {})
            self.values[guard] = None
        return found

    @property
    def _aside(self) -> bool:
        """Whether what happens now is not to be recorded: an operation is run, or another thread is at work."""
        return self._running or get_ident() != self._thread

    def _real(self, argument: Any) -> Any:
        """The argument of a node with values for nodes, in lists that the network may change."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, dict):
            return {key: self._real(value) for key, value in argument.items()}
        if isinstance(argument, list):
            return [self._real(value) for value in argument]
        if isinstance(argument, tuple):
            return tuple(self._real(value) for value in argument)
        if isinstance(argument, slice):
            return slice(*map(self._real, (argument.start, argument.stop, argument.step)))
        return argument

    def _run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if kind == "placeholder":
            return self.images
        if kind == "get_attr":
            if target in self.constants:
                return self.constants[target]
            owner, name = self.owner(target)
            return getattr(owner, name)
        if kind == "call_module":
            return self.called[target](*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _is_derived(self, node: fx.Node, args: tuple[Any, ...]) -> bool:
        """Whether a value that is no tensor was computed from the values of tensors, and not from their shapes."""
        sources = [self.values[source] for source in node.all_input_nodes]
        named = args[1] if node.target is getattr else getattr(node.target, "__name__", node.target)
        taken_out = node.target in (getattr, operator.getitem) and not isinstance(sources[0], Tensor)
        if node.op in ("call_function", "call_method") and any(map(holds_tensor, sources)):
            return named not in _OF_SHAPE and not taken_out
        return any(source in self.derived for source in node.all_input_nodes)

    def _constant(self, tensor: Tensor) -> str:
        path = f"_constant_{next(_NUMBERS)}"
        self.constants[path] = tensor
        return path

    def _check_modes(self) -> None:
        if current_modes() != self._modes:
            raise NetworkError(f"it changes gradient mode, autocast or the like in its own forward pass{self._place()}")

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Within the block, plain attributes of modules that are read are noted, and tensors read are nodes."""

        def watched(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if self._aside or name in _MODULE_S_OWN or name.startswith("__") or module not in self._paths:
                return value
            if type(value) is Recorded:
                return value
            if name in _CHECKPOINTING:
                return False  # its code cannot be traced, and changes no value
            if is_plain(value):
                self.reads.setdefault((module, name), value)
            elif isinstance(value, Tensor) and name in object.__getattribute__(module, "__dict__"):
                path = self._paths[module]
                return self.create_proxy("get_attr", f"{path}.{name}" if path else name, (), {})
            return value

        nn.Module.__getattribute__ = watched  # type: ignore[assignment, method-assign]
        try:
            with (
                _replaced(torch, self._factories()),
                _replaced(builtins, {"isinstance": self._is_instance, "len": self._length}),
            ):
                yield
        finally:
            del nn.Module.__getattribute__

    def _put_back(self, state: list[tuple[dict[str, Any], dict[str, Any]]], *, own: bool) -> list[str]:
        """Put back what a module had, and name what it has set: recorded values, and others where ``own``."""
        changed = []
        for kept, before in state:
            for name in [*kept]:
                value, old = kept[name], before.get(name, kept)
                recorded = issubclass(type(value), fx.Proxy)
                if value is old or not (own or recorded):
                    continue
                if name in before:
                    kept[name] = old
                else:
                    del kept[name]
                if not recorded or self.values[value.node] is not old:  # self.count += 1 sets the very tensor
                    changed.append(name)
        return changed

    def _factories(self) -> dict[str, Any]:
        """The functions that make a tensor from sizes alone, which torch.fx does not record."""

        def recording(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._aside:
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return {name: partial(recording, getattr(torch, name)) for name in _FACTORIES}

    def _is_instance(self, value: Any, kinds: Any) -> bool:
        """``isinstance``, which takes a recorded value for what it was for the batch."""
        if self._aside or type(value) is not Recorded:
            return _is_instance(value, kinds)
        return _is_instance(value, kinds) or _is_instance(self.values[value.node], kinds)

    def _length(self, value: Any) -> Any:
        """``len``, which is a recorded value for a recorded tensor: a batch size, as a rule."""
        if type(value) is Recorded and not self._aside and _is_instance(self.values[value.node], Tensor):
            return self.create_proxy("call_function", _length, (value,), {})
        return _length(value)

    def _place(self) -> str:
        """Where in the network's code the tracing is."""
        ours = (fx.__path__[0], nn.__path__[0], torch.overrides.__file__, torch._tensor.__file__, _PACKAGE)
        for frame in reversed(traceback.extract_stack()):
            if not frame.filename.startswith(ours):
                return f" ({frame.filename.rpartition('/')[2]}, line {frame.lineno}: {frame.line})"
        return ""


_NUMBERS = count()
"""Constants of several recordings have names of their own."""

_is_instance, _length = isinstance, len
_PACKAGE = str(Path(__file__).parents[2])

_FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "zeros",
)  # fmt: skip


@contextmanager
def _replaced(module: Any, functions: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def _random_state() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["pos"], numpy["key"].tobytes(), bytes(torch.get_rng_state().numpy())


def _state(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The instance's attributes and buffers, each with a copy of what it held."""
    return [(kept, dict(kept)) for kept in (vars(module), module._buffers)]
