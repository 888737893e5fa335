"""What the words of a vocabulary stand for: the patches of images that are nearest to them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.activations.hooks import evaluating
from cka_probe.activations.stage_shapes import StageShape, as_map
from cka_probe.activations.taps import Taps
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.bags.codes import squared_distances, without_ring
from cka_probe.distill.outputs.words import PicturedWords
from cka_probe.images.preprocessing import as_pixels
from cka_probe.images.sources.source import ImageSource, read_labelled
from cka_probe.networks.models import Subject

WORDS, PATCHES, IMAGES = 16, 8, 256
"""Words that are shown, patches of each, and images that these come from."""

_BATCH = 32


def pictured_words(
    words: Tensor, layer: TracedLayer, teacher: Subject, images: ImageSource, seed: int
) -> PicturedWords:
    """The words that are used most, each with the patches whose features are nearest to it.

    A patch is the part of an image that 3 × 3 locations lie over; what the network sees of the image is larger.

    Args:
        words: (k, c) of a vocabulary.
        layer: whose maps they are of.
        teacher: the network, on the device of ``words``.
        images: to take patches from; of more than `IMAGES`, some are drawn.
        seed: of the draw.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(images))[:IMAGES])
    shape = StageShape.of(layer, teacher.preprocessing.size[1:])
    assert shape is not None, "a level has a map"
    used = torch.zeros(len(words), dtype=torch.float64, device=words.device)
    smallest, places, pixels = [], [], []
    for inputs, maps in _maps(teacher, layer, shape, images, drawn, words.device):
        distances = squared_distances(without_ring(maps.float()), words.float())
        used += torch.bincount(distances.argmin(1).flatten(), minlength=len(words))
        of_image = distances.min(2)
        smallest.append(of_image.values.cpu().numpy())
        places.append(of_image.indices.cpu().numpy())
        pixels.append(as_pixels(inputs, teacher.preprocessing))
    shares = (used / used.sum()).cpu().numpy()
    chosen = np.argsort(-shares, kind="stable")[:WORDS]
    chosen = chosen[shares[chosen] > 0]
    every, where = np.concatenate(pixels), np.concatenate(places)[:, chosen]
    nearest = np.argsort(np.concatenate(smallest)[:, chosen], axis=0, kind="stable")[:PATCHES].T
    patches = [
        [_patch(every[image], int(where[image, word]), shape) for image in row] for word, row in enumerate(nearest)
    ]
    return PicturedWords(layer.name, shares[chosen], np.array(patches))


def _maps(  # noqa: PLR0913  # what a pass needs
    teacher: Subject,
    layer: TracedLayer,
    shape: StageShape,
    images: ImageSource,
    drawn: NDArray[np.int64],
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """For each batch the network's images and the maps."""
    transform, found = teacher.preprocessing.transform(), []
    taps = Taps(teacher.network, (layer,), name=teacher.name, classes=0)
    try:
        with evaluating(teacher.network, device, repr(teacher.name)):
            for first in range(0, len(drawn), _BATCH):
                numbers = drawn[first : first + _BATCH].tolist()
                inputs = torch.stack([transform(read_labelled(images, number)[0]) for number in numbers])
                taken = taps.run(inputs.to(device), "for the picture of its words", (first,))[1][0]
                found.append((inputs, as_map(taken, shape)))
    finally:
        taps.remove()
    return found


def _patch(pixels: NDArray[np.uint8], place: int, shape: StageShape) -> NDArray[np.uint8]:
    """The part of an image that lies below 3 × 3 locations, around one of those without the outer ring."""
    row, column = divmod(place, shape.grid[1] - 2)
    (height, width), (rows, columns) = pixels.shape[:2], shape.grid
    tall, wide = max(3 * height // rows, 1), max(3 * width // columns, 1)
    top, left = min(row * height // rows, height - tall), min(column * width // columns, width - wide)
    return pixels[top : top + tall, left : left + wide]
