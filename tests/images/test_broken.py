"""--skip-broken: which images are left out or replaced, alike by all networks, processes and resumed runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import IterableDataset

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.config import Training
from cka_probe.distill.training.pipeline import TrainingImages
from cka_probe.errors import DataError
from cka_probe.images.broken import Search, describe_broken
from cka_probe.images.parts import open_parts
from cka_probe.images.samples import sample, without_broken
from cka_probe.images.sources.source import open_source
from cka_probe.runtime.world import World
from tests.images.sources.test_streams import reds, write_shards

CPU = World(torch.device("cpu"))
SEARCH = Search(CPU, workers=0)
ASKED: dict[str, Any] = {"layers": "stages", "image_size": 32, "device": "cpu", "workers": 0}


@pytest.fixture
def pets(image_folder: Path, tmp_path: Path) -> Path:
    """The twelve images of two classes, the second of which has two broken ones, a copy to be changed."""
    root = tmp_path / "pets"
    shutil.copytree(image_folder, root)
    (root / "dogs" / "3.png").write_bytes(b"no image")
    good = (root / "dogs" / "5.png").read_bytes()
    (root / "dogs" / "5.png").write_bytes(good[: len(good) // 2])
    return root


@pytest.fixture
def whole(pets: Path, tmp_path: Path) -> Path:
    """The same without the broken ones."""
    root = tmp_path / "whole"
    shutil.copytree(pets, root)
    for number in (3, 5):
        (root / "dogs" / f"{number}.png").unlink()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_comparison_leaves_broken_images_out_for_all_networks(
    pets: Path, whole: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    models = ["zoo:cnn", "zoo:mlp"]
    expected = cp.compare(models, data=whole, **ASKED)
    with pytest.raises(DataError, match=r"\d.png must be an image"):
        cp.compare(models, data=pets, **ASKED)
    found = cp.compare(models, data=pets, skip_broken=True, **(ASKED | {"workers": workers}))
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)  # one batch, in another order
    data = found.provenance.data
    assert data.examples == 10
    assert {Path(one.image).name for one in data.broken} == {"3.png", "5.png"}
    assert all(one.error for one in data.broken)
    assert "2 images could not be read: " in caplog.text
    assert not cp.compare(models, data=whole, skip_broken=True, **ASKED).provenance.data.broken


def test_an_interrupted_comparison_goes_on_with_the_same_images(pets: Path, tmp_path: Path) -> None:
    asked = ASKED | {"data": pets, "skip_broken": True, "batch_size": 4, "checkpoint_minutes": 0}

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    expected = cp.compare(["zoo:cnn"], **asked)
    assert expected.provenance.data.examples == 8, "the last two are no batch"
    with pytest.raises(KeyboardInterrupt):
        cp.compare(["zoo:cnn"], checkpoint=tmp_path / "kept", progress=stop, **asked)
    found = cp.compare(["zoo:cnn"], checkpoint=tmp_path / "kept", resume=True, **asked)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.provenance.data == expected.provenance.data


def test_of_a_pair_with_one_broken_image_both_are_left_out(pets: Path, image_folder: Path) -> None:
    for data, paired in ((pets, image_folder), (image_folder, pets)):
        found = cp.compare(["zoo:cnn"], data=data, paired=paired, skip_broken=True, **ASKED)
        assert found.provenance.data.examples == 10
        assert {Path(one.image).parent.parent for one in found.provenance.data.broken} == {pets}


@pytest.mark.slow
def test_features_that_are_kept_stand_beside_networks(pets: Path, image_folder: Path, tmp_path: Path) -> None:
    asked = ASKED | {"data": pets, "skip_broken": True, "pool": "mean"}
    cp.extract({"kept": "zoo:cnn"}, tmp_path / "after", **asked)
    names = (tmp_path / "after" / "samples.txt").read_text().split("\n")
    assert len(names) == 10
    assert "dogs/3.png" not in names
    assert len(yaml.safe_load((tmp_path / "after" / "run.yaml").read_text())["result"]["data"]["broken"]) == 2
    shutil.copytree(pets, tmp_path / "broken")
    shutil.copytree(image_folder, pets, dirs_exist_ok=True)
    cp.extract({"kept": "zoo:cnn"}, tmp_path / "before", **(asked | {"skip_broken": False}))
    shutil.copytree(tmp_path / "broken", pets, dirs_exist_ok=True)
    expected = cp.compare({"one": "zoo:cnn", "kept": "zoo:cnn"}, **asked).values
    for folder in ("after", "before"):  # extracted once an image was broken, and when it was not yet
        found = cp.compare({"one": "zoo:cnn", "kept": str(tmp_path / folder)}, **asked)
        np.testing.assert_allclose(found.values, expected, atol=1e-6)
    alone = cp.compare([str(tmp_path / "after")])
    assert len(alone.provenance.data.broken) == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on less than 3 cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_goes_on_after_a_broken_image(tmp_path: Path, workers: int) -> None:
    asked = sample(open_source("wds/any", data_dir=str(write_shards(tmp_path, broken=9))), 25, seed=0)
    found = without_broken(asked, SEARCH)
    assert [one.index for one in found.broken] == [9]
    numbers = [number for number in range(25) if number != 9]
    expected = [numbers[first : first + 4] for first in range(0, 24, 4)]
    assert reds(found, workers=workers) == expected
    assert reds(found, workers=workers, numbers=[2, 5]) == [expected[2], expected[5]]


def test_an_iterable_dataset_may_yield_what_is_no_image() -> None:
    class Data(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(9):
                yield "text" if number == 4 else Image.new("RGB", (16, 16), (10 * number, 0, 0))

    found = without_broken(sample(open_source(Data()), 9, seed=0), SEARCH)
    assert [one.place for one in found.broken] == ["Data/4"]
    assert reds(found) == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_processes_share_the_search(pets: Path) -> None:
    source = open_source(pets)
    indices = np.arange(len(source))
    whole = SEARCH([source], indices)
    shares = [Search(_Alone(CPU.device, rank, 2), workers=0)([source], indices) for rank in (0, 1)]
    assert [one.index for one in whole] == [9, 11]
    assert sorted(one.index for share in shares for one in share) == [9, 11]


class _Alone(World):
    """One of several processes, which hears nothing of the others."""

    def gathered(self, value: Any) -> list[Any]:
        return [value]


def test_where_nothing_is_left_the_run_is_refused(pets: Path) -> None:
    for path in pets.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of the 12 images of .* could be read"):
        cp.compare(["zoo:cnn"], data=pets, skip_broken=True, **ASKED)
    for path in list(pets.glob("*/*.png"))[:2]:
        Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(DataError, match="at least 4 examples, but 2 are left"):
        cp.compare(["zoo:cnn"], data=pets, skip_broken=True, **ASKED)


def pictures(images: TrainingImages, epoch: int = 0) -> dict[int, tuple[int, bytes]]:
    """Number of an image -> its label and its pixels, of an epoch without augmentation."""
    return {
        int(index): (int(label), pixels.numpy().tobytes())
        for batch in images.epoch(epoch)
        for pixels, label, index in zip(batch.images, batch.labels, batch.indices, strict=True)
    }


@pytest.fixture
def colours_with_broken(colours: Path, tmp_path: Path) -> Path:
    """Of the training images the last two of a class and the very last are broken, and one of those held out."""
    root = tmp_path / "colours"
    shutil.copytree(colours, root)
    train = sorted((root / "train").glob("*/*.png"))
    for path in (train[22], train[23], train[-1], root / "val" / "1 green" / "3.png"):
        path.write_bytes(b"no image")
    return root


@pytest.mark.parametrize("memory", [0, 1])
def test_in_training_the_next_image_with_its_own_label_takes_the_place(
    colours_with_broken: Path, memory: float
) -> None:
    parts = open_parts(colours_with_broken, memory=memory, skip_broken=SEARCH)
    asked = {"batch_size": 12, "workers": 0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    images = TrainingImages(parts.train, Training(student="x", **asked), (3, 16, 16))
    assert (images.steps, len(parts.train), len(parts.test)) == (6, 72, 35)
    found = pictures(images)
    assert found[22] == found[23] == found[24]
    assert found[22][0] == 1, "the label of the next class"
    assert found[71] == found[0], "after the last comes the first"
    assert len({pixels for _, pixels in found.values()}) == 69
    assert len(parts.broken) == 4
    assert describe_broken(parts.broken).startswith("4 images could not be read: ")
    assert describe_broken(parts.broken).endswith(", …")


@pytest.mark.slow
def test_a_run_lists_what_it_did_without(
    colours_with_broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "distill", "--method", "none", "--student", "s=zoo:mlp@random", "--data", str(colours_with_broken),
        "--epochs", "1", "--batch-size", "12", "--workers", "0",
    ]  # fmt: skip
    assert main([*asked, "--out", str(tmp_path / "no")]) == 2
    assert ".png must be an image, but could not be read" in capsys.readouterr().err
    assert main([*asked, "--skip-broken", "--out", str(tmp_path / "run")]) == 0
    assert "4 images could not be read: " in capsys.readouterr().err
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert record["options"]["skip_broken"] is True
    assert len(record["result"]["broken"]) == 4
    assert record["result"]["images"]["test"] == 35


def test_a_dataset_of_timm_names_the_broken_image_and_does_not_replace_it(pets: Path) -> None:
    data = ImageDataset(str(pets))
    with pytest.raises(DataError, match=r"ImageDataset/(9|11) must be an image"):
        cp.compare(["zoo:cnn"], data=data, **ASKED)
    found = cp.compare(["zoo:cnn"], data=data, skip_broken=True, **ASKED)
    assert [one.image for one in found.provenance.data.broken] == ["ImageDataset/9", "ImageDataset/11"]
    labels = [open_source(data).read(index)[1] for index in (0, 10)]
    assert labels == [0, 1]
    bright = ImageDataset(str(pets), transform=lambda image: image.point(lambda _: 255))
    assert np.asarray(open_source(bright).read(0)[0]).min() == 255


def test_a_data_set_of_files_of_torchvision_names_the_file(pets: Path) -> None:
    source = open_source("torch/image_folder", data_dir=str(pets))
    with pytest.raises(DataError, match=r"torch/image_folder/validation/9 \(.*3\.png\) must be an image"):
        source.read(9)
