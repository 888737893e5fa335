"""The two modules that a network is cut into, and the recordings that they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cka_probe.activations.forward import eagerly
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.modules import module_at, modules_of
from cka_probe.activations.recording import CONSTANT, Read, Recorder, holds_tensor
from cka_probe.errors import CkaProbeError, NetworkError
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.user_code import describe_error, keeping_modes


class Crossing(NamedTuple):
    """What crosses a cut where that is more than one activation.

    Attributes:
        activation: what the stage puts out; ``crossing._replace(activation=other)`` runs the tail on another one.
        rest: sizes, masks and the like.
    """

    activation: Any
    rest: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Recording:
    """A network's forward pass, cut in two, for one state of the attributes that it reads.

    Attributes:
        reads: those attributes; among them are training flags.
        children: (module, name, child) of each module that is called.
        constants: tensors that belong to no module, by their names in the code.
        head: runs the head; its argument is the segment.
        tail: runs the tail.
        paths: what head and tail read of the segment: paths of modules and of tensors.
        changed: which of the values that cross, the activation first, the tail changes in place.
        rest: the further values that cross, for the example and for one image more.
        activation: what the stage put out for the example.
    """

    reads: tuple[Read, ...]
    children: tuple[tuple[nn.Module, str, nn.Module | None], ...]
    constants: dict[str, Tensor]
    head: Callable[..., Any]
    tail: Callable[..., Any]
    paths: tuple[tuple[str, ...], tuple[str, ...]]
    changed: tuple[bool, ...]
    rest: tuple[tuple[Any, Any], ...]
    shapes: tuple[torch.Size, ...]

    def holds(self) -> bool:
        """Whether the network's attributes are what they were."""
        for module, name, value in self.reads:  # a plain loop, for torch.compile
            if getattr(module, name, None) != value:
                return False
        return True


class Recordings:
    """The recordings of a network that is cut at a stage: one for each state of the attributes that it reads.

    Args:
        network: without wrappers.
        stage: path of a module.
        call: which of its calls; None where there must be one.
        example: (n, c, h, w).
    """

    def __init__(self, network: nn.Module, stage: str, call: int | None, example: Tensor) -> None:
        self.network = network
        self.example = example
        self._stage = stage
        self._call = call
        self._known: list[Recording] = []

    def current(self) -> Recording:
        """That of the network as it is now."""
        for known in self._known:
            if known.holds():
                found = known
                break
        else:
            found = self._record()
        for module, name, child in found.children:
            if module._modules.get(name) is not child:
                raise NetworkError(f"The module {name!r} of the network was replaced after the cut. Cut it again.")
        return found

    @property
    def known(self) -> Sequence[Recording]:
        """Those made so far."""
        return self._known

    @torch.compiler.disable
    def _record(self) -> Recording:
        with ExitStack() as stack:
            for context in (keeping_random_state(), keeping_modes(), torch.enable_grad(), eagerly()):
                stack.enter_context(context)
            try:
                found = self._recorded()
            except CkaProbeError as error:
                raise NetworkError(f"The network cannot be cut behind {self._stage!r}: {error}.") from error
            except Exception as error:
                raise NetworkError(
                    f"The network cannot be cut behind {self._stage!r}: torch.fx cannot trace its forward pass "
                    f"({describe_error(error).removesuffix('.')})."
                ) from error
        self._known.append(found)
        return found

    def _recorded(self) -> Recording:
        recorder, stage = self._pass(self.example)
        graphs, rest = _split(recorder, stage)
        further: tuple[Any, ...] = ()
        if rest:
            larger = torch.cat([self.example, self.example[:1]])
            other, _ = self._pass(larger)
            nodes = list(other.graph.nodes)
            places = {node: place for place, node in enumerate(recorder.graph.nodes)}
            same = len(nodes) == len(places)
            further = tuple(other.values[nodes[places[node]]] if same else None for node in rest)
        crossing = (stage, *rest)
        owners = {path: recorder.owner(path) for path in recorder.called}
        return Recording(
            reads=tuple((module, name, value) for (module, name), value in recorder.reads.items()),
            children=tuple((module, name, module._modules.get(name)) for module, name in owners.values()),
            constants={path: recorder.constant(path) for graph in graphs for path in _paths(graph) if CONSTANT in path},
            head=_function(graphs[0], "head"),
            tail=_function(graphs[1], "tail"),
            paths=(_paths(graphs[0]), _paths(graphs[1])),
            changed=tuple(node in recorder.changed for node in crossing),
            rest=tuple(zip((_kept(recorder.values[node]) for node in rest), map(_kept, further), strict=True)),
            shapes=tuple(tensor.shape for _, tensor in tensors_in(recorder.values[stage])),
        )

    def _pass(self, images: Tensor) -> tuple[Recorder, fx.Node]:
        """A recorded pass, and the node of the stage."""
        through, above = [self.network], self._stage.split(".")[:-1]
        for depth in range(len(above)):
            through.append(module_at(self.network, ".".join(above[: depth + 1])))
        recorder = Recorder(self.network, through, images.clone())
        with keeping_buffers(self.network):
            seed_everything(0)
            recorder.record()
        calls = recorder.calls.get(recorder.path_of(self._stage), [])
        if not calls:
            raise NetworkError("its forward pass never calls the module, or not from the modules around it")
        if self._call is None and len(calls) > 1:
            names = ", ".join(f"'{self._stage}[{number}]'" for number in range(len(calls)))
            raise NetworkError(f"its forward pass calls the module {len(calls)} times; name the call, one of {names}")
        if (self._call or 0) >= len(calls):
            raise NetworkError(f"its forward pass calls the module only {len(calls)} times")
        return recorder, calls[self._call or 0]


class _Shared(nn.Module):
    """Holds some of a module's children and tensors, under their names, and shares its training flag."""

    def __init__(self, owner: nn.Module) -> None:
        training = owner.training
        self.__dict__["_owner"] = (owner,)  # in a tuple, so that it is no child
        super().__init__()
        owner.training = training
        self.__dict__["_names"] = {}

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The owner's flag."""
        return self._owner[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        self._owner[0].training = mode

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Shared:
        super()._apply(fn, recurse)
        (owner,) = self._owner
        for own, shared in ((self._parameters, owner._parameters), (self._buffers, owner._buffers)):
            shared.update({name: tensor for name, tensor in own.items() if name in shared})
        return self

    def share(self, name: str) -> None:
        """Hold a tensor of the owner's; once more after it was replaced there."""
        (owner,) = self._owner
        for own, theirs in ((self._parameters, owner._parameters), (self._buffers, owner._buffers)):
            if name in theirs:
                if own.get(name) is not theirs[name]:
                    own[name] = theirs[name]
                return
        self.__dict__[name] = owner.__dict__[name]


class Segment(_Shared):
    """A part of a network's forward pass."""

    _number: int

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
                self._tensors.append((holder, name))
        self._adopted.append(recording)

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


@contextmanager
def keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Within the block, the network may change its buffers; afterwards they are what they were."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in modules_of(network).values()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in kept:
                module._buffers[name] = buffer
                if buffer is not None and values is not None and not torch.equal(buffer, values):
                    buffer.copy_(values)


def _split(recorder: Recorder, stage: fx.Node) -> tuple[tuple[fx.Graph, fx.Graph], list[fx.Node]]:
    """The graphs of head and tail, and the nodes besides the stage whose values cross.

    Sizes of what the head knows are found in the head. What depends on parameters, buffers and sizes alone (position
    embeddings, say) is computed again in the tail, so that its gradient, and its change when the weights change, are
    those of the network.
    """
    nodes = list(recorder.graph.nodes)
    front = dict.fromkeys(nodes[: nodes.index(stage) + 1])
    for node in nodes[len(front) : -1]:
        if _is_pure(recorder, node) and not holds_tensor(recorder.values[node]) and node not in recorder.derived:
            if all(source in front and source is not stage for source in node.all_input_nodes):
                front[node] = None
    tail = [node for node in nodes if node not in front]
    repeatable: dict[fx.Node, bool] = {}
    for node in front:
        of_sizes = holds_tensor(recorder.values[node])
        repeatable[node] = _is_pure(recorder, node) and all(
            repeatable[source] or (of_sizes and not holds_tensor(recorder.values[source]))
            for source in node.all_input_nodes
        )
    rest: list[fx.Node] = []
    repeated: set[fx.Node] = set()
    needed = [source for node in tail for source in node.all_input_nodes]
    while needed:
        node = needed.pop()
        if node not in front or node is stage or node in repeated:
            continue
        if repeatable[node]:
            repeated.add(node)
            needed += node.all_input_nodes
        elif node not in rest:
            rest.append(node)
    rest.sort(key=nodes.index)
    head_graph, tail_graph = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in front:
        copies[node] = head_graph.node_copy(node, copies.__getitem__)
    output = copies[stage]
    if rest:
        output = head_graph.call_function(Crossing, (output, tuple(copies[node] for node in rest)))
    head_graph.output(output)
    found = {stage: tail_graph.placeholder("activation")}
    found |= {node: tail_graph.placeholder(f"rest_{number}") for number, node in enumerate(rest)}
    for node in nodes:
        if node in repeated or node not in front:
            found[node] = tail_graph.node_copy(node, found.__getitem__)
    return (head_graph, tail_graph), rest


def _is_pure(recorder: Recorder, node: fx.Node) -> bool:
    """Whether a node may run at another place: it draws no random numbers, and nothing is changed in place."""
    return (
        node.op in ("get_attr", "call_function", "call_method")
        and node not in recorder.impure
        and node not in recorder.changed
    )


def _paths(graph: fx.Graph) -> tuple[str, ...]:
    """What its code reads of the segment."""
    return tuple(dict.fromkeys(node.target for node in graph.nodes if node.op in ("call_module", "get_attr")))


def _function(graph: fx.Graph, name: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), namespace)  # as torch.fx makes the forward of a GraphModule
    function: Callable[..., Any] = namespace["forward"]
    return function


def _kept(value: Any) -> Any:
    return None if holds_tensor(value) else value


def _filled(recording: Recording, activation: Any, count: int) -> tuple[Any, ...]:
    """The values that cross beside an activation, where they follow from its batch size."""
    shapes = [tensor.shape for _, tensor in tensors_in(activation)]
    known = recording.shapes
    if [shape[1:] for shape in shapes] != [shape[1:] for shape in known]:
        raise NetworkError(
            f"The tail needs sizes as well, which are known for an activation of shape {tuple(known[0])} alone, but got "
            f"{tuple(shapes[0]) if shapes else 'no tensor'}. Give it all that the head returns, or cut on images of "
            "the size that makes this shape."
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
