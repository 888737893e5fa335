"""Which network gives the assistant its early stages: the convolutional one, as the paper has it."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from cka_probe.activations.modules import module_at
from cka_probe.distill.methods.loss import Side

Kind = Literal["cnn", "attention", "mlp"]
First = Literal["student-first", "teacher-first"]

_QUERIES = re.compile(r"(to_|w)?(q|qk|qkv|qkvs|query)(_proj|_conv)?|query_key_value|c_attn")
"""Names that attention layers give to what makes their queries."""


def kind_of(side: Side) -> Kind:
    """What mixes positions in the blocks of the last two stages of a network (half of its blocks without four stages).

    ``"attention"`` where one of them has queries, else ``"cnn"`` where one has a convolution over more than one pixel,
    else ``"mlp"``.
    """
    modules = [module for block in _last_blocks(side) for module in module_at(side.network, block).modules()]
    if any(_has_queries(module) for module in modules):
        return "attention"
    return "cnn" if any(_is_spatial(module) for module in modules) else "mlp"


def direction(student: Side, teacher: Side) -> tuple[First, str]:
    """Which network comes first in the assistant, and why.

    A convolutional network comes before an attention or MLP network. Of two of one kind, or of an attention and an MLP
    network, the student comes first; that choice is ours.
    """
    own, other = kind_of(student), kind_of(teacher)
    if own == "cnn" and other != "cnn":
        return "student-first", f"{student.name} is convolutional and {teacher.name} is not"
    if other == "cnn" and own != "cnn":
        return "teacher-first", f"{teacher.name} is convolutional and {student.name} is not"
    return "student-first", "both are convolutional" if own == "cnn" else "neither is convolutional"


def _last_blocks(side: Side) -> list[str]:
    """The blocks of the last two stages; the stages themselves where no blocks are known."""
    order = {name: position for position, name in enumerate(side.layers)}
    before = order[side.stages[-3].name] if len(side.stages) > 2 else -1
    last = [name for name in side.blocks if order[name] > before]
    paths = [side.layers[name].activation.module for name in last or [stage.name for stage in side.stages[-2:]]]
    return [path for path in dict.fromkeys(paths) if path]


def _has_queries(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        _QUERIES.fullmatch(name.lower()) for name, _ in module.named_children()
    )


def _is_spatial(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
