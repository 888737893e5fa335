"""The recordings of a network that is cut: one for each state of the attributes that its forward pass reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from cka_probe.activations.cutting.graphs import function_of, paths_in, split
from cka_probe.activations.cutting.recorded import holds_tensor
from cka_probe.activations.cutting.recorder import Recorder
from cka_probe.activations.forward import eagerly
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.modules import module_at, modules_of
from cka_probe.errors import CkaProbeError, NetworkError
from cka_probe.runtime.memory import is_out_of_memory
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.user_code import describe_error, keeping_modes

MOST_KEPT = 16
"""Recordings of a network: an attribute that changes from step to step makes a new one each time."""


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

    reads: tuple[tuple[nn.Module, str, Any], ...]
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
        for module, name, value in self.reads:  # noqa: SIM110  # torch.compile needs a plain loop
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self) -> Recording:
        with ExitStack() as stack:
            for context in (keeping_random_state(), keeping_modes(), torch.enable_grad(), eagerly()):
                stack.enter_context(context)
            try:
                found = self._recorded()
            except CkaProbeError as error:
                raise NetworkError(f"The network cannot be cut behind {self._stage!r}: {error}.") from error
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise NetworkError(
                    f"The network cannot be cut behind {self._stage!r}: torch.fx cannot trace its forward pass "
                    f"({describe_error(error).removesuffix('.')})."
                ) from error
        self._known = [*self._known[1 - MOST_KEPT :], found]
        return found

    def _recorded(self) -> Recording:
        recorder, stage = self._pass(self.example)
        graphs, rest = split(recorder, stage)
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
            constants=recorder.constants,
            head=function_of(graphs[0], "head"),
            tail=function_of(graphs[1], "tail"),
            paths=(paths_in(graphs[0]), paths_in(graphs[1])),
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
        with restoring_buffers(self.network):
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


@contextmanager
def restoring_buffers(network: nn.Module) -> Iterator[None]:
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


def _kept(value: Any) -> Any:
    return None if holds_tensor(value) else value
