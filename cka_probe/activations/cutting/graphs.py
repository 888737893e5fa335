"""The graph of a forward pass, split behind a stage into that of the head and that of the tail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from cka_probe.activations.cutting.recorded import holds_tensor
from cka_probe.activations.cutting.recorder import Recorder


class Crossing(NamedTuple):
    """What crosses a cut where that is more than one activation.

    Attributes:
        activation: what the stage puts out; ``crossing._replace(activation=other)`` runs the tail on another one.
        rest: sizes, masks and the like.
    """

    activation: Any
    rest: tuple[Any, ...]


def split(recorder: Recorder, stage: fx.Node) -> tuple[tuple[fx.Graph, fx.Graph], list[fx.Node]]:
    """The graphs of head and tail, and the nodes besides the stage whose values cross.

    Sizes of what the head knows are found in the head. What depends on parameters, buffers and sizes alone (position
    embeddings, say) is computed again in the tail, so that its gradient, and its change when the weights change, are
    those of the network.
    """
    nodes = list(recorder.graph.nodes)
    front = dict.fromkeys(nodes[: nodes.index(stage) + 1])
    for node in nodes[len(front) : -1]:
        of_sizes = _is_pure(recorder, node) and not holds_tensor(recorder.values[node]) and node not in recorder.derived
        if of_sizes and all(source in front and source is not stage for source in node.all_input_nodes):
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


def paths_in(graph: fx.Graph) -> tuple[str, ...]:
    """What its code reads of the segment."""
    return tuple(dict.fromkeys(node.target for node in graph.nodes if node.op in ("call_module", "get_attr")))


def function_of(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Its code as a function of the segment and the values that come in."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{name}>", "exec"), namespace)  # as torch.fx makes the forward of a GraphModule
    function: Callable[..., Any] = namespace["forward"]
    return function
