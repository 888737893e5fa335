"""Which layers' maps become words, and how many words there are."""

from __future__ import annotations

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.bags.codes import LEAST_MAP
from cka_probe.distill.methods.loss import Side
from cka_probe.errors import SpecError

MOST_WORDS = 8192
"""As in the paper, for ImageNet."""

IMAGES_A_WORD = 4
"""A vocabulary holds the words of a quarter of an epoch at most: its first words are random, and must be gone soon."""


def levels_of(side: Side, levels: str, option: str) -> tuple[TracedLayer, ...]:
    """The stages whose maps become words.

    Args:
        side: the network of the words.
        levels: numbers of stages, from 1, with commas; last for the last two of those with maps of 5 × 5 or more, and
            all for all of those.
        option: that names the network's stages, for messages.

    Raises:
        SpecError: a stage is not there, or its map is too small.
    """
    grids = [_grid(side, layer) for layer in side.stages]
    large = [number for number, grid in enumerate(grids, 1) if grid and min(grid) >= LEAST_MAP]
    sizes = "; ".join(
        f"{number} ({layer.name}): {f'{grid[0]} × {grid[1]}' if grid else 'no map'}"
        for number, (layer, grid) in enumerate(zip(side.stages, grids, strict=True), 1)
    )
    if not large:
        raise SpecError(
            f"Words need a stage whose map is {LEAST_MAP} × {LEAST_MAP} or larger, but {side.name!r} has none at "
            f"{side.image_size[0]} × {side.image_size[1]} px. Its stages: {sizes}. Use a larger --image-size, or other "
            f"layers ({option})."
        )
    if levels in ("last", "all"):
        return tuple(side.stages[number - 1] for number in (large if levels == "all" else large[-2:]))
    chosen = list(dict.fromkeys(int(number) for number in levels.split(",")))
    wrong = [number for number in chosen if number not in large]
    if wrong:
        raise SpecError(
            f"--levels must be stages of {side.name!r} whose maps are {LEAST_MAP} × {LEAST_MAP} or larger, but names "
            f"{wrong[0]}. Its stages: {sizes}. Use --levels {','.join(map(str, large[-2:]))}."
        )
    return tuple(side.stages[number - 1] for number in chosen)


def word_count(asked: int | None, images: int, batch: int) -> int:
    """How many words a vocabulary holds, K: a multiple of the images of a step.

    Args:
        asked: for; None for a quarter of the training images, at most 8192.
        images: in the training set.
        batch: images of a step on all processes.

    Raises:
        SpecError: what is asked for is no multiple.
    """
    if asked is None:
        return max(min(MOST_WORDS, images // IMAGES_A_WORD) // batch, 1) * batch
    if asked % batch:
        near = max(round(asked / batch), 1) * batch
        raise SpecError(
            f"--words must be a multiple of the {batch} images of a step on all processes, but is {asked}. Use "
            f"--words {near}."
        )
    return asked


def _grid(side: Side, layer: TracedLayer) -> tuple[int, int] | None:
    shape = StageShape.of(layer, side.image_size)
    return shape.grid if shape else None
