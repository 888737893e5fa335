"""Each image of a batch is read once, and a bad one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from cka_probe.errors import DataError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source

SMALL = Preprocessing(size=(3, 16, 16)).transform()
LARGE = Preprocessing(size=(3, 24, 24)).transform()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_subject_s_tensor_comes_from_the_same_image(image_folder: Path, workers: int) -> None:
    samples = sample(open_source(image_folder), 12, 0)
    got = list(batches(samples, [SMALL, LARGE], Loading(8, workers)))
    assert [[tuple(part.shape) for part in batch] for batch in got] == [
        [(8, 3, 16, 16), (8, 3, 24, 24)],
        [(4, 3, 16, 16), (4, 3, 24, 24)],
    ]
    image = samples.source.read(int(samples.indices[9]))[0]
    assert isinstance(image, Image.Image)
    torch.testing.assert_close(got[1][0][1], SMALL(image))
    torch.testing.assert_close(got[1][1][1], LARGE(image))


def test_a_last_batch_below_four_is_dropped(image_folder: Path) -> None:
    samples = sample(open_source(image_folder), 11, 0)
    assert [len(batch[0]) for batch in batches(samples, [SMALL], Loading(8))] == [8]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", None])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    for index in range(5):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(tmp_path / f"{index}.png")
    broken = tmp_path / "2.png"
    broken.write_bytes(content if content is not None else broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png must be an image, but could not be read") as caught:
        list(batches(sample(open_source(tmp_path), 5, 0), [SMALL], Loading(5, workers)))
    assert "Traceback" not in str(caught.value)


def test_gray_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        suffix = "tif" if mode in ("CMYK", "I;16") else "png"
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
    (batch,) = batches(sample(open_source(tmp_path), 7, 0), [SMALL], Loading(8))
    assert batch[0].shape == (7, 3, 16, 16)
