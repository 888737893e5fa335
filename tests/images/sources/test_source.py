"""A data spec names a source, whose images have an order and identities."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.images.sources import datasets
from cka_probe.images.sources.digits import digits
from cka_probe.images.sources.source import open_source


def test_digits_are_scikit_learn_s_and_their_parts_are_disjoint() -> None:
    every, train, held_out = digits(), digits("train"), digits("validation")
    assert [len(images) for images, _ in (every, train, held_out)] == [1797, 1438, 359]
    assert np.asarray(every[0][0]).max() == 15 * 255 // 16, "the brightest pixel of the first digit is 15 of 16"
    assert every[1][4] == held_out[1][0]
    with pytest.raises(SpecError, match="'train' and 'validation'"):
        digits("dev")


def test_a_folder_is_read_in_the_order_of_its_paths_with_or_without_class_folders(image_folder: Path) -> None:
    nested, flat = open_source(image_folder), open_source(image_folder / "cats")
    assert (len(nested), len(flat)) == (12, 6)
    assert (nested.identity(0), flat.identity(0)) == ("cats/0.png", "0.png")


@pytest.mark.parametrize(
    ("folders", "split", "found"),
    [
        (("train", "val"), None, "val"),
        (("train", "test"), None, "test"),
        (("train",), None, "train"),
        (("train", "val"), "train", "train"),
        (("train", "validation"), "val", "validation"),
        (("extra", "val"), "extra", "extra"),
        (("bicycle", "train"), None, ""),
    ],
)
def test_the_part_of_a_folder_is_validation_unless_asked(
    tmp_path: Path, folders: tuple[str, ...], split: str | None, found: str
) -> None:
    for name in folders:
        (tmp_path / name / "class").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "class" / "a.png")
    assert open_source(tmp_path, split=split).name == str(tmp_path / found if found else tmp_path)


def test_a_split_that_is_not_there_and_an_empty_folder_say_so(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match="must have a folder for the split 'train'"):
        open_source(image_folder, split="train")
    (tmp_path / "parts" / "val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"must have a folder for the split 'test' \(test\)"):
        open_source(tmp_path / "parts", split="test")
    (tmp_path / "parts" / "val").rename(tmp_path / "parts" / "test")
    with pytest.raises(DataError, match=r"must have a folder for the split 'val' \(validation, val, valid\)"):
        open_source(tmp_path / "parts", split="val")
    with pytest.raises(DataError, match=r"must hold images \(\.png, "):
        open_source(tmp_path)
    with pytest.raises(SpecError, match="'nowhere' is none of these"):
        open_source("nowhere")


def test_a_dataset_without_a_length_that_is_read_by_number_is_refused() -> None:
    class Endless:
        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(1, 2, 2)

    with pytest.raises(SpecError, match="Endless has no __len__"):
        open_source(Endless())  # type: ignore[arg-type]


def test_a_data_loader_is_refused_by_that_name() -> None:
    with pytest.raises(SpecError, match=r"is a DataLoader\. Give loader\.dataset"):
        open_source(DataLoader(TensorDataset(torch.zeros(4, 3, 2, 2))))  # type: ignore[arg-type]


def test_where_a_data_set_lies_is_for_data_sets(image_folder: Path) -> None:
    with pytest.raises(SpecError, match="--data-dir and --download are for data sets"):
        open_source(image_folder, download=True)


@pytest.mark.full
@pytest.mark.data
def test_cifar100_is_read_as_a_folder(cifar100: Path) -> None:
    source = open_source(cifar100)
    assert (len(source), source.name) == (10_000, str(cifar100 / "val"))
    assert len(open_source(cifar100, split="train")) == 500


@pytest.mark.parametrize(
    ("spec", "package"), [("wds/x", "cka-probe[shards]"), ("hfds/x", "datasets"), ("tfds/x", "tensorflow-datasets")]
)
def test_a_package_that_reads_a_data_set_is_named_where_it_is_missing(
    spec: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Please install it")

    monkeypatch.setattr(timm.data, "create_dataset", fail)
    monkeypatch.setattr(datasets, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=re.escape(f"pip install '{package}'")):
        open_source(spec, data_dir="anywhere")
