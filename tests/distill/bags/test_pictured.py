"""The patches that stand for a word are the nearest ones, cut from where their locations lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cka_probe.distill.bags.pictured import pictured_words
from cka_probe.distill.outputs.words import PicturedWords, load_words, plot_words, save_words
from cka_probe.distill.subjects import examine
from cka_probe.errors import OutputError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject

SIZE, CELL = 32, 4


class Means(nn.Module):
    """A map of the mean colour of each 4 x 4 cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.AvgPool2d(CELL)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.cells(x).mean((2, 3))


class Squares:
    """Ten gray images, each with a bright square of 3 x 3 cells somewhere."""

    name, classes, in_memory = "squares", ("one",), True

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.corners = rng.integers(1, 5, (10, 2))

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> tuple[object, int]:
        from PIL.Image import fromarray

        pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
        row, column = CELL * self.corners[index]
        pixels[row : row + 3 * CELL, column : column + 3 * CELL, 1] = 200
        return fromarray(pixels), 0

    def identity(self, index: int) -> str:
        return str(index)

    def place(self, index: int) -> str:
        return str(index)


def pictured() -> PicturedWords:
    sees = Preprocessing(size=(3, SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    subject = Subject("means", Means(), sees)
    (layer,) = (
        layer for name, layer in examine(subject, "cells", torch.device("cpu")).side.layers.items() if name == "cells"
    )
    green, black, unused = (0.57, 0.0, -1.0), (-1.0,) * 3, (9.0,) * 3
    words = torch.tensor([unused, (-1, green[0], -1), black])
    return pictured_words(words, layer, subject, Squares(), seed=0)  # type: ignore[arg-type]


def test_words_come_with_their_share_and_the_patches_around_their_locations() -> None:
    found = pictured()
    assert found.level == "cells"
    assert found.patches.shape == (2, 8, 12, 12, 3), "the word that no location is near to is left out"
    inside = [
        (max(min(row + 3, 7) - max(row, 1), 0), max(min(column + 3, 7) - max(column, 1), 0))
        for row, column in Squares().corners
    ]
    share = np.mean([tall * wide / 36 for tall, wide in inside])
    assert found.shares == pytest.approx([1 - share, share])
    assert found.patches[1, 0, 4:8, 4:8, 1].min() > 190, "the middle cell is the location"
    assert found.patches[0, 0, 4:8, 4:8].max() < 20


def test_they_are_written_read_and_drawn(tmp_path: Path) -> None:
    words, path = pictured(), tmp_path / "words.npz"
    assert load_words(path) is None
    save_words(words, path)
    again = load_words(path)
    assert again is not None
    assert (again.level, again.shares.tolist()) == (words.level, words.shares.tolist())
    assert np.array_equal(again.patches, words.patches)
    assert len(plot_words(again).axes) == 2 * 8
    for content in (b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="words.npz cannot be read"):
            load_words(path)
    np.savez(path, level=np.array("x"), shares=np.ones(3), patches=np.ones((2, 2)))
    with pytest.raises(OutputError, match="words.npz cannot be read"):
        load_words(path)
