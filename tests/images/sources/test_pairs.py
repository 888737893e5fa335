"""Partners are found by their paths; an image without one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cka_probe.errors import DataError, SpecError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.pairs import pair_names, paired_folder
from cka_probe.images.sources.source import open_source

RAW = Preprocessing(size=(1, 8, 8), mean=(0.0,), std=(1.0,), crop_pct=1.0).transform()


def write(root: Path, values: dict[str, int]) -> Path:
    for path, value in values.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(root / path)
    return root


def test_partners_are_found_by_their_path_whatever_their_suffix(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"x/1.png": 10, "x/2.png": 20, "y/1.png": 30, "y/10.png": 40, "y.png": 50})
    second = write(tmp_path / "b", {"y.bmp": 51, "y/10.bmp": 41, "y/1.png": 31, "x/2.bmp": 21, "x/1.bmp": 11})
    source = open_source(f"folder:{first}")
    other = paired_folder(source, f"folder:{second}")
    samples = sample(source, 5, 0)
    paired = type(samples)(samples.source, samples.indices, samples.sha256, other)
    ((one, two),) = batches(paired, [RAW, RAW], Loading(8), sides=[0, 1])
    values = [(tensor[:, 0, 0, 0] * 255).round().tolist() for tensor in (one, two)]
    assert [value + 1 for value in values[0]] == values[1]


def test_the_same_split_of_both_is_taken(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {f"{split}/c/{i}.png": i for split in ("train", "val") for i in range(4)})
    second = write(tmp_path / "b", {f"{split}/c/{i}.png": i for split in ("train", "val") for i in range(4)})
    other = paired_folder(open_source(first, split="train"), second, split="train")
    assert other.name == str(second / "train")


def test_an_image_without_a_partner_is_named_on_either_side(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {f"c/{i}.png": i for i in range(8)})
    second = write(tmp_path / "b", {f"c/{i}.png": i for i in range(4)} | {"c/new.png": 1})
    with pytest.raises(DataError) as caught:
        paired_folder(open_source(first), second)
    message = str(caught.value)
    assert "4 of the 8 images of" in message
    assert "(c/4.png, c/5.png, c/6.png, …)" in message
    assert "1 of the 5 images of" in message
    assert "(c/new.png)" in message


def test_two_images_of_one_path_but_for_the_suffix_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"1.png": 1, "1.bmp": 2})
    with pytest.raises(DataError, match=r"has both 1\.bmp and 1\.png"):
        paired_folder(open_source(first), first)


@pytest.mark.slow
def test_pairs_are_of_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {f"{i}.png": i for i in range(4)})
    with pytest.raises(SpecError, match="two folders, but the first are those of digits"):
        paired_folder(open_source("digits"), folder)
    with pytest.raises(SpecError, match="'nowhere' is not one"):
        paired_folder(open_source(folder), "nowhere")


def test_a_broken_partner_is_named_with_its_folder(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, {f"{i}.png": i for i in range(4)}) for name in "ab")
    (second / "2.png").write_text("no image")
    samples = sample(open_source(first), 4, 0)
    paired = type(samples)(samples.source, samples.indices, samples.sha256, paired_folder(samples.source, second))
    with pytest.raises(DataError, match=rf"{second}/2\.png must be an image"):
        list(batches(paired, [RAW, RAW], Loading(4), sides=[0, 1]))


def test_folders_are_called_by_what_tells_them_apart() -> None:
    assert pair_names("data/human", "data/cat") == ("human", "cat")
    assert pair_names("data/human/val", "data/cat/val") == ("human/val", "cat/val")
    assert pair_names("data", "data/cat") == ("data", "cat")
    assert pair_names("data", "folder:data/") == ("data", "data (paired)")
    assert np.unique(pair_names("x", "x")).size == 2
