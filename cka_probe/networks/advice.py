"""What a user can do about a network that cannot run: advice that fits the error, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from cka_probe.networks.models import Subject
from cka_probe.runtime.user_code import describe_error

_SHAPES = re.compile(r"\b(sizes?|shapes?|shaped|dimensions?|heights?|widths?|pixels|resolution|divisible)\b", re.I)
_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
_TYPES = re.compile(r"same dtype|scalar type|expected .*(Float|Half|Double|BFloat16) but found", re.I)
_DEVICES = re.compile(r"same device|on (the )?(cpu|cuda)", re.I)


def wrong_size(subject: Subject, shape: Sequence[int]) -> str | None:
    """The message where a network takes images of one size only, and these are of another; None where not.

    Args:
        subject: its network and its spec.
        shape: (channels, height, width) of the images.
    """
    takes = _only_size(subject.network)
    if takes is None or takes == tuple(shape[-2:]):
        return None
    option = "view_size" if "view_size" in subject.source else "--image-size"
    drop = f"Drop {option}" if tuple(shape) == subject.preprocessing.size else "Give it images of that size"
    side = str(shape[-1]) if shape[-1] == shape[-2] else f"({shape[-2]},{shape[-1]})"
    spec = str(subject.source.get("spec", ""))
    base, at, weights = spec.partition("@")
    resized = "" if "img_size=" in base or not base else f", or build it for these: {base},img_size={side}{at}{weights}"
    return f"{subject.name!r} takes {_by(takes)} images, but these are {_by(shape[-2:])}. {drop}{resized}."


def advice(error: BaseException | None) -> str:
    """A sentence on what to do about an error that a network raised, after a space; empty where none fits."""
    text = describe_error(error, with_place=False) if error is not None else ""
    channels = _CHANNELS.search(text)
    if channels is not None:
        return (
            f" It takes {channels[1]} channels, but the images have {channels[2]}: set its pretrained_cfg to "
            f"{{'input_size': ({channels[1]}, height, width)}}, or build it for {channels[2]}."
        )
    if _TYPES.search(text):
        return " Its weights are of several floating types. Convert them to one, for example by network.float()."
    if _DEVICES.search(text):
        return " Register the tensors that it uses as buffers, so that they move with it, or use --device cpu."
    if isinstance(error, (RuntimeError, AssertionError, ValueError)) and _SHAPES.search(text):
        return " If it takes images of another size, give that size with --image-size."
    return ""


def _only_size(network: nn.Module) -> tuple[int, int] | None:
    """The (height, width) that a network of timm's takes, if it takes only one."""
    config = getattr(network, "pretrained_cfg", None)
    config = getattr(config, "__dict__", config)
    if not (isinstance(config, Mapping) and config.get("fixed_input_size")):
        return None
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    return (int(size[0]), int(size[1]))


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} × {size[1]}"
