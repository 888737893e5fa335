"""Views of one image: their sizes, that they follow from the random state, and that each is of the original."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.errors import SpecError
from cka_probe.images.multi_crop import Crops, MultiCrop, scaled
from cka_probe.images.preprocessing import Preprocessing

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def image(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("channels", MODES)
def test_views_have_their_sizes_and_follow_from_the_random_state(channels: int) -> None:
    views = MultiCrop(Preprocessing(size=(channels, 32, 32)), Crops(2, 24), Crops(5, 16), flip=0.5)
    found = []
    for make in (views, pickle.loads(pickle.dumps(views)), views):
        torch.manual_seed(4)
        found.append(make(image(MODES[channels])))
    whole, crops, patches = found[0]
    assert whole.shape == (channels, 32, 32)
    assert crops.shape == (2, channels, 24, 24)
    assert patches.shape == (5, channels, 16, 16)
    assert all(view.dtype == torch.uint8 for view in found[0])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    torch.manual_seed(5)
    assert not torch.equal(views(image(MODES[channels]))[1], crops)


def test_the_whole_image_is_as_the_network_sees_it() -> None:
    sees = Preprocessing(size=(3, 32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    (whole,) = MultiCrop(sees, Crops(0, 1), Crops(0, 1), flip=0)(image())
    torch.testing.assert_close(whole.float() / 255, sees.transform()(image()))
    (flipped,) = MultiCrop(sees, Crops(0, 1), Crops(0, 1), flip=1)(image())
    assert torch.equal(flipped, whole.flip(2))


def test_crops_are_of_the_original_and_not_of_the_whole_as_seen() -> None:
    """Of a ramp: the whole image is cut to its middle, the crops are not."""
    ramp = np.tile(np.linspace(0, 255, 400, dtype=np.uint8), (400, 1))
    views = MultiCrop(Preprocessing(size=(1, 32, 32), crop_pct=0.25), Crops(16, 32), Crops(0, 1), flip=0)
    torch.manual_seed(0)
    whole, crops = views(Image.fromarray(ramp))
    assert int(whole.max()) - int(whole.min()) < 80
    middles = crops.float().mean((1, 2, 3))
    assert float(middles.max() - middles.min()) > 100, "crops come from all of the original"


def test_patches_come_from_different_cells_of_the_grid() -> None:
    sheet = torch.arange(43 * 43).reshape(1, 43, 43).float()
    views = MultiCrop(Preprocessing(size=(1, 32, 32)), Crops(0, 1), Crops(9, 16), flip=0)
    patches = views._cut(sheet)
    corners = patches[:, 0, 0, 0]
    tops, lefts = corners // 43, corners % 43
    assert {(int(top) // 11, int(left) // 11) for top, left in zip(tops, lefts, strict=True)} == {
        (row, column) for row in range(3) for column in range(3)
    }
    assert float(tops.max()) + 16 <= 43


def test_sizes_are_in_proportion_and_read_from_text() -> None:
    assert [tuple(map(str, scaled(size))) for size in (224, 64, 32, 8)] == [
        ("2x160", "5x96"), ("2x48", "5x24"), ("2x24", "5x16"), ("2x8", "5x8"),
    ]  # fmt: skip
    assert Crops.parse("none", "--patches", 9).count == 0
    for text in ("2", "x96", "2x", "10x8", "0x8", "2x0", "2 x 8", ""):
        with pytest.raises(SpecError, match="--patches must be none or COUNTxSIZE"):
            Crops.parse(text, "--patches", 9)
