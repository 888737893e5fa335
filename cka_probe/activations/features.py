"""An activation of any layout -> features (n, d). Pure functions of tensors and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

from torch import Tensor

from cka_probe.activations.pooling import Pool


@dataclass(frozen=True)
class Layout:
    """Where the examples, the channels and the class token of an activation are.

    Attributes:
        batch_axis: the axis that grows with the batch.
        parts: entries along it for one example: 1, or the number of windows or patches that share the axis.
        parts_first: whether the parts of one example are apart by n, (parts, n), and not side by side, (n, parts).
        channels_last: whether the channels of a map are its last axis (n, h, w, c), not its first (n, c, h, w).
        prefix_tokens: class and register tokens at the start of a token sequence.
        class_token: whether the first of them is a class token.
    """

    batch_axis: int = 0
    parts: int = 1
    parts_first: bool = False
    channels_last: bool = False
    prefix_tokens: int = 0
    class_token: bool = True


class Prefix(NamedTuple):
    """The tokens that a network puts before those of its patches.

    Attributes:
        class_tokens: class tokens, and the like of distillation, which come first.
        registers: register tokens.
    """

    class_tokens: int = 0
    registers: int = 0


_NO_PREFIX = Prefix()


def as_features(activation: Tensor, layout: Layout = Layout(), pool: Pool = "none") -> Tensor:
    """Features, one row an example, of an activation.

    Args:
        activation: of any shape that `layout` describes: vectors (n, d), tokens (n, t, c), maps (n, c, h, w) or
            (n, h, w, c), or more axes.
        layout: where its examples, channels and class token are.
        pool: ``"none"`` keeps every value (their order is that of memory, which no kernel sees). ``"mean"`` averages
            over space or over tokens, class and register tokens left out. ``"cls"`` takes the class token where the
            activation has one, else the mean.

    Returns:
        (n, d): a view where one exists.
    """
    by_part = activation.movedim(layout.batch_axis, 0)
    if pool == "none" or (by_part.ndim <= 2 and layout.parts == 1):
        return _flat(_by_example(by_part, layout))
    pooled = by_part
    if by_part.ndim == 3:
        pooled = _pooled_tokens(by_part, layout, pool)
    elif by_part.ndim > 3:
        pooled = by_part.flatten(1, -2).mean(1) if layout.channels_last else by_part.flatten(2).mean(2)
    return pooled if layout.parts == 1 else _by_example(pooled, layout).mean(1)


def infer_layout(
    small: Sequence[int],
    large: Sequence[int],
    *,
    image_size: tuple[int, ...],
    prefix: Prefix = _NO_PREFIX,
    channels_last: bool = False,
) -> Layout | None:
    """The layout of an activation, from its shapes for 2 and for 3 images.

    Args:
        small: its shape for a batch of 2.
        large: its shape for a batch of 3.
        image_size: (height, width) of the images, or (frames, height, width) of the videos.
        prefix: what the network says of the tokens that it puts before its patch tokens.
        channels_last: where the channels of a map are when its shape allows both.

    Returns:
        The layout; None where no single axis grows in proportion to the batch.
    """
    if len(small) != len(large):
        return None
    growing = [axis for axis, (two, three) in enumerate(zip(small, large, strict=True)) if two != three]
    if len(growing) != 1 or 3 * small[growing[0]] != 2 * large[growing[0]]:
        return None
    axis = growing[0]
    parts = small[axis] // 2
    rest = tuple(size for other, size in enumerate(small) if other != axis)
    if len(rest) == len(image_size) + 1:
        first_is_channels = _same_aspect(rest[-2:], image_size)
        last_is_channels = _same_aspect(rest[-3:-1], image_size)
        channels_last = last_is_channels and (channels_last or not first_is_channels)
    tokens = rest[0] if len(rest) == 2 else 0
    found = _found_prefix(tokens, prefix, image_size)
    return Layout(axis, parts, False, channels_last, sum(found), bool(found.class_tokens or not sum(found)))


def _found_prefix(tokens: int, prefix: Prefix, image_size: tuple[int, ...]) -> Prefix:
    """Which of the tokens before those of the patches a sequence has.

    A network may add its class token late (CaiT), keep it out of some layers, or add registers later: they are there
    where the other tokens fill a grid of the images' shape, or where there is no other token. One token more than a
    grid, of a network that does not say what it is, is a class token.
    """
    for found in (prefix, Prefix(prefix.class_tokens, 0), Prefix(0, prefix.registers)):
        if sum(found) and (tokens == sum(found) or _fills_grid(tokens - sum(found), image_size)):
            return found
    if not sum(prefix) and not _fills_grid(tokens, image_size) and tokens > _LEAST_GRID:
        return Prefix(1) if _fills_grid(tokens - 1, image_size) else _NO_PREFIX
    return _NO_PREFIX


_LEAST_GRID = 4  # patches


def _by_example(by_part: Tensor, layout: Layout) -> Tensor:
    """(parts · n, ...) -> (n, parts, ...); unchanged where an example has one part."""
    if layout.parts == 1:
        return by_part
    shape = by_part.shape[1:]
    if layout.parts_first:
        return by_part.reshape(layout.parts, -1, *shape).transpose(0, 1)
    return by_part.reshape(-1, layout.parts, *shape)


def _flat(x: Tensor) -> Tensor:
    """(n, ...) -> (n, d), the axes in the order of memory, so that a channels-last map is not copied."""
    if x.is_contiguous():
        return x.reshape(x.shape[0], -1)
    strides = x.stride()
    order = sorted(range(1, x.ndim), key=lambda axis: -strides[axis])
    return x.permute(0, *order).reshape(x.shape[0], -1)


def _pooled_tokens(tokens: Tensor, layout: Layout, pool: Pool) -> Tensor:
    if layout.prefix_tokens == tokens.shape[1] and not layout.class_token:  # registers alone
        return tokens.mean(1)
    if layout.prefix_tokens and layout.class_token and (pool == "cls" or tokens.shape[1] == layout.prefix_tokens):
        return tokens[:, 0]
    return tokens[:, layout.prefix_tokens :].mean(1)


def _same_aspect(grid: Sequence[int], image_size: tuple[int, ...]) -> bool:
    """Whether a (rows, columns) grid has the shape of the images, up to the rounding of their strides."""
    size = image_size[-2:]  # of a video without its frames
    scale = max(grid) / max(size)
    return all(abs(side - scale * length) < 1 for side, length in zip(grid, size, strict=True))


def _fills_grid(tokens: int, image_size: tuple[int, ...]) -> bool:
    """Whether so many tokens fill a grid of the images' shape; of videos one to each frame, or to several."""
    if tokens <= 0:
        return False
    if len(image_size) == 3:
        frames, *size = image_size
        return any(tokens % t == 0 and _fills_grid(tokens // t, tuple(size)) for t in range(1, frames + 1))
    near = round(sqrt(tokens * image_size[0] / image_size[1]))
    return any(
        tokens % rows == 0 and _same_aspect((rows, tokens // rows), image_size)
        for rows in range(max(near - 2, 1), near + 3)
    )
