"""Images of 12 bits in files of 16 are reported, once, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

import cka_probe as cp
from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.preparation import prepare
from cka_probe.errors import DataError, SpecError
from cka_probe.images.dark import warn_if_dark
from cka_probe.images.parts import open_parts
from cka_probe.images.sources.folder import Folder
from cka_probe.images.sources.source import open_source
from cka_probe.runtime.world import World
from tests.images.sixteen_bits import gray, write, write_shard

DARK = {"a": 100, "b": 2000, "c": 4095}


def compared(data: Any, **options: Any) -> None:
    fixed: dict[str, Any] = {"examples": 6, "batch_size": 6, "image_size": 8, "workers": 0, "layers": "all"}
    cp.compare(["zoo:cnn@random"], data=data, **fixed, **options)


def reported(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names of the data that were reported since the last call."""
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return [text.removeprefix("The images of ").split(" are ")[0] for text in said if "almost black" in text]


def test_almost_black_images_are_reported_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path, DARK)
    warn_if_dark(open_source(root))
    assert [record.getMessage() for record in caplog.records] == [
        f"The images of {root / 'val'} are almost black: they have 16 bits, where 65,535 is white, but no pixel of the "
        "first 6 is above 4,095. If white is 4095, as with 12 bits, use --full-scale 4095 (in Python, full_scale=4095)."
    ]


@pytest.mark.slow
def test_each_use_reports_them_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path, DARK)
    compared(root)
    assert reported(caplog) == [str(root / "val")]
    parts = open_parts(root, memory=1)
    warn_if_dark(parts.train)
    assert reported(caplog) == [str(root / "train")]
    warn_if_dark(open_parts(root / "train").train)
    assert reported(caplog) == [f"{root / 'train'} (train)"]
    networks = {"student": "zoo:cnn@random", "data": str(root), "image_size": 8, "method": "none"}
    prepare(Training(**networks, epochs=1, batch_size=2, workers=0), World(torch.device("cpu")))
    assert reported(caplog) == [str(root / "train")]
    with pytest.raises(SpecError, match="must have the data's 3 classes"):
        evaluate("zoo:cnn@random", data=str(root), image_size=8)
    assert reported(caplog) == [str(root / "val")]
    with pytest.raises(SpecError, match="must have the data's 3 classes"):
        evaluate("zoo:cnn@random", data=str(root), image_size=8, full_scale=4095)
    assert reported(caplog) == []
    for opened in (parts.test, open_source(root)):
        compared(opened)
        assert reported(caplog) == [], "whoever opened it was told"


def test_those_of_datasets_and_shards_are_reported_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compared([(gray(value), 0) for value in DARK.values() for _ in range(2)])
    assert reported(caplog) == ["list"]
    pytest.importorskip("webdataset")
    compared("wds/any", data_dir=str(write_shard(tmp_path, DARK)))
    assert reported(caplog) == ["wds/any/validation"]


def test_partners_are_looked_at_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bright, dark = write(tmp_path / "bright"), write(tmp_path / "dark", DARK)
    compared(bright, paired=dark)
    assert reported(caplog) == [str(dark / "val")]


def test_others_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_dark(open_parts(write(tmp_path / "bright", {"a": 100, "b": 200, "c": 4096})).test)
    warn_if_dark(open_parts(write(tmp_path / "told", DARK), full_scale=4095).train)
    for path in (tmp_path / "black" / name / f"{index}.png" for name in "ab" for index in range(10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    warn_if_dark(open_parts(tmp_path / "black").train)
    compared("digits")
    assert reported(caplog) == []


def test_ordinary_images_cost_one_look_and_streams_none(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    original = Folder.original

    def counted(self: Folder, index: int) -> Image.Image:
        looked.append(index)
        return original(self, index)

    monkeypatch.setattr(Folder, "original", counted)
    warn_if_dark(open_source(image_folder), np.array([7, 3, 5, 1]))
    assert looked == [7]

    class Once(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("it was read")

    warn_if_dark(open_source(Once()), np.arange(8))


def test_a_broken_first_image_is_left_to_its_reader(tmp_path: Path) -> None:
    root = write(tmp_path, DARK)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"\.png must be an image, but could not be read"):
        compared(root)
