"""Copies among the images are found by their pixels, told and recorded; no value depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.probing.duplicates import Duplicates
from cka_probe.results.cautions import cautions
from tests.toy_networks import killed_after, offset_networks

QUICK: dict[str, Any] = {"layers": "all", "batch_size": 8, "workers": 0}


def images(copied: int) -> torch.Tensor:
    """24 images, so many of which are copies of one at the same place in the first half."""
    found = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found[12 : 12 + copied] = found[:copied]
    return found


def pairs_of(similarity: cp.Similarity) -> list[set[str]]:
    return [set(pair) for pair in similarity.provenance.data.duplicates.pairs]


def test_copies_are_counted_named_and_told(caplog: pytest.LogCaptureFixture) -> None:
    found = cp.compare(offset_networks(), data=images(5), **QUICK)
    duplicates = found.provenance.data.duplicates
    assert duplicates.images == 5
    assert len(duplicates.pairs) == 3
    for pair in pairs_of(found):
        first, second = sorted(int(name.rpartition("/")[2]) for name in pair)
        assert second - first == 12
    (told,) = (record.getMessage() for record in caplog.records if "exact copies" in record.getMessage())
    assert told.startswith("5 of the 24 images are exact copies of another (")
    assert "raise debiased CKA" in told
    assert "Remove the copies." in told
    assert told in cautions(found)


def test_without_copies_nothing_is_said_and_nothing_recorded(caplog: pytest.LogCaptureFixture) -> None:
    found = cp.compare(offset_networks(), data=images(0), **QUICK)
    assert found.provenance.data.duplicates is None
    assert "copies" not in caplog.text


def test_copies_raise_debiased_cka_of_unrelated_features_as_they_are_said_to() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 64, 200))
    again = np.tile(np.arange(16), 4)
    assert abs(cp.linear_cka(x, y)) < 0.1
    assert cp.linear_cka(x[again], y[again]) > 0.4


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_copies_where_their_pixels_are(tmp_path: Path, workers: int) -> None:
    rng = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    with Image.open(tmp_path / "3.png") as image:
        image.save(tmp_path / "other.bmp")  # another file, the same pixels
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    options = {**QUICK, "batch_size": 4, "workers": workers, "image_size": 8}
    found = cp.compare({"net": network}, data=tmp_path, **options)
    assert found.provenance.data.duplicates.images == 1
    assert pairs_of(found) == [{"3.png", "other.bmp"}]


def test_a_pair_is_a_copy_where_both_of_its_images_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        for index in range(8):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / side / f"{index}.png")
    for side, copied in (("one", (1, 2)), ("two", (1,))):
        for index in copied:
            (tmp_path / side / f"{index}.png").write_bytes((tmp_path / side / "0.png").read_bytes())
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    options = {**QUICK, "paired": tmp_path / "two", "image_size": 8}
    found = cp.compare({"net": network}, data=tmp_path / "one", **options)
    assert pairs_of(found) == [{"0.png", "1.png"}]


@pytest.mark.slow
def test_a_resumed_run_and_one_in_turn_know_the_same_copies(tmp_path: Path) -> None:
    whole = cp.compare(offset_networks(), data=images(9), **QUICK)
    killed_after(2, offset_networks(), data=images(9), checkpoint=tmp_path, **QUICK)
    resumed = cp.compare(offset_networks(), data=images(9), checkpoint=tmp_path, resume=True, **QUICK)
    in_turn = cp.compare(offset_networks(), data=images(9), memory="100GB", **QUICK)
    expected = whole.provenance.data.duplicates
    assert expected.images == 9
    assert resumed.provenance.data.duplicates == in_turn.provenance.data.duplicates == expected


def test_copies_of_all_processes_are_brought_together_once() -> None:
    class Two:
        """Rank 0 of two processes; the other has had the second batch."""

        size, writes = 2, True

        def gathered(self, own: Any) -> list[Any]:
            return [own, {4: torch.tensor([5, 2, 2])}]

    copies = Duplicates()
    copies.note(0, torch.tensor([1, 2, 3, 4]))
    copies.note(0, torch.tensor([1, 2, 3, 4]))
    for _ in range(2):
        copies.merge(Two())  # type: ignore[arg-type]
    again = Duplicates()
    again.load(copies.state(Path()), Path(), torch.device("cpu"))
    assert again.record(str) == {"duplicates": {"images": 2, "pairs": [["1", "5"], ["1", "6"]]}}


@pytest.mark.slow
def test_features_of_copies_are_known_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cp.extract(offset_networks(), tmp_path / "f", data=images(1), **QUICK)
    assert main(["compare", str(tmp_path / "f"), "--batch-size", "8", "--out", str(tmp_path / "out")]) == 0
    assert "1 of the 24 images is an exact copy of another" in capsys.readouterr().err
    assert "is an exact copy of another" in (tmp_path / "out" / "report.html").read_text()
