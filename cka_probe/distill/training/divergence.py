"""A training that is not finite any more: which weights are not, and which options are the likely cause."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.distill.config import Training, method_options
from cka_probe.distill.methods import Method
from cka_probe.runtime.ranges import flag, shown
from cka_probe.runtime.world import World

_DOMINATES = 1000
"""A part of the loss that is so many times the cross-entropy decides where the weights go."""


@torch.no_grad()
def broken_weights(network: nn.Module, world: World) -> list[str]:
    """The names of the parameters whose norm is not finite on any process; weights of 1e20 are among them.

    Args:
        network: on the device of ``world``.
        world: the processes.
    """
    found = [(name, weight) for name, weight in network.named_parameters() if weight.numel()]
    if not found:
        return []
    norms = torch.stack([_norm(weight.detach()) for _, weight in found])
    broken = world.sum((~norms.isfinite()).float()).tolist()
    return [name for (name, _), count in zip(found, broken, strict=True) if count]


def advice(config: Training, broken: Collection[str], before: Mapping[str, float]) -> str:
    """What to change, by what was not finite first.

    Args:
        config: of the training.
        broken: names of the parts of the loss that were not finite in the first step where one was not; none where
            the weights broke.
        before: the last finite value of each part; NaN where there was none.
    """
    of_type = " Or train without --fp16: values above 65504 overflow in float16." if config.fp16 else ""
    return _advice(config, broken, before) + of_type


def _advice(config: Training, broken: Collection[str], before: Mapping[str, float]) -> str:
    most = max(1.0, before.get("ce", 0.0))
    suspects = [name for name in broken if name != "ce"] if "ce" not in broken else []
    suspects = suspects or [name for name, value in before.items() if name != "ce" and value > _DOMINATES * most]
    options: tuple[str, ...] = config.method.loss_options if suspects else ()
    if list(broken) == ["ce"] or before.get("ce", 0.0) > _DOMINATES:
        options = ("ce_weight", *options)
    changed = [text for name in options if (text := _apart(config.method, name))]
    if changed:
        what = f"The cause is in {' and '.join(map(repr, suspects or ['ce']))}: it"
        return f"{what} depends on {', '.join(changed)}. Choose a value nearer to the default."
    if broken and all(map(isnan, before.values())):
        return "No step before it was finite either: check the weights of the student, and its mean and deviation."
    return f"Lower --lr, {'lower' if config.clip is not None else 'set'} --clip, or lengthen --warmup-epochs."


def _apart(method: Method, name: str) -> str:
    """An option with its value and its default; empty where they are the same."""
    default, value = method_options(type(method))[name], getattr(method, name)
    if value == default:
        return ""
    return f"{flag(name)} ({_plain(value)}, by default {_plain(default)})"


def _plain(value: Any) -> str:
    return " ".join(map(shown, value)) if isinstance(value, tuple) else shown(value)


def _norm(weight: Tensor) -> Tensor:
    """In float32 or more: a norm in half precision overflows early."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=kind)
    return norm.double()
