"""What a stage puts out, for one image: a map, or tokens that fill a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from cka_probe.activations.trace import Trace, TracedLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StageShape:
    """The shape of an activation that has positions.

    Attributes:
        kind: ``"map"`` (n, c, h, w), ``"tokens"`` (n, t, c) or ``"map_last"`` (n, h, w, c).
        channels: c.
        grid: (rows, columns) of its positions.
        prefix_tokens: class and register tokens before those of the grid.
    """

    kind: str
    channels: int
    grid: tuple[int, int]
    prefix_tokens: int = 0

    @classmethod
    def of(cls, layer: TracedLayer, image_size: tuple[int, int]) -> StageShape | None:
        """The shape of a traced layer; None where it puts out neither a map nor tokens that fill a grid.

        Args:
            layer: of a dry run.
            image_size: (height, width) of its images.
        """
        shape, layout = layer.shape, layer.layout
        if layout.batch_axis != 0 or layout.parts != 1:
            return None
        if len(shape) == 3 and layout.channels_last:
            return cls("map_last", shape[2], (shape[0], shape[1]))
        if len(shape) == 3:
            return cls("map", shape[0], (shape[1], shape[2]))
        grid = _grid(shape[0] - layout.prefix_tokens, image_size) if len(shape) == 2 else None
        return cls("tokens", shape[1], grid, layout.prefix_tokens) if grid else None

    @property
    def positions(self) -> int:
        """How many pixels or tokens, the prefix tokens left out."""
        return self.grid[0] * self.grid[1]


def positions_of(layer: TracedLayer, trace: Trace) -> int | None:
    """How many positions a traced layer puts out for one image or video.

    Args:
        layer: of `trace`.
        trace: of a network on images, or on videos, whose maps are (n, c, t, h, w) or (n, t, h, w, c).

    Returns:
        The number of pixels or tokens, the prefix tokens left out; None where it puts out neither a map nor tokens
        that fill a grid.
    """
    if not trace.frames:
        shape = StageShape.of(layer, trace.image_size)
        return shape.positions if shape else None
    layout = layer.layout
    if layout.batch_axis != 0 or layout.parts != 1 or len(layer.shape) not in (2, 4):
        return None
    positions = layer.shape[:-1] if layout.channels_last or len(layer.shape) == 2 else layer.shape[1:]
    return prod(positions) - layout.prefix_tokens


def as_map(activation: Tensor, shape: StageShape) -> Tensor:
    """An activation of such a shape as a map (n, c, h, w), prefix tokens left out."""
    if shape.kind == "map":
        return activation
    if shape.kind == "map_last":
        return activation.permute(0, 3, 1, 2)
    return activation[:, shape.prefix_tokens :].transpose(1, 2).reshape(-1, shape.channels, *shape.grid)


def _grid(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of so many tokens, nearest to the shape of the images; None where only a line would do."""
    height, width = image_size
    options = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    if not options:
        return None
    best = min(options, key=lambda grid: abs(grid[0] * width - grid[1] * height))
    rows, columns = best
    return best if rows * columns <= 4 or abs(rows * width - columns * height) <= max(height, width) else None
