"""Datasets that are read by number: timm's, torchvision's and a user's own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import TensorDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source

SMALL = Preprocessing(size=(3, 16, 16)).transform()
LARGE = Preprocessing(size=(3, 24, 24)).transform()


def test_a_torchvision_data_set_is_read_through_timm(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 9, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 9) + bytes(9))
    source = open_source("torch/mnist", data_dir=str(tmp_path))
    assert len(source) == 9
    (batch,) = batches(sample(source, 9, 0), [SMALL], Loading(16))
    assert batch[0].shape == (9, 3, 16, 16)


def test_a_data_set_that_is_missing_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--data-dir DIR"):
        open_source("torch/cifar100")
    with pytest.raises(DataError, match=r"torch/cifar100 .* could not be opened.*--download"):
        open_source("torch/cifar100", data_dir=str(tmp_path))


def test_a_broken_image_in_a_data_set_of_timm_is_named_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / "a" / f"{index}.png")
    (tmp_path / "a" / "3.png").write_bytes(b"no image")
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: ImageDataset(str(tmp_path)))
    samples = sample(open_source("hfds/some/set"), 6, 0)
    with pytest.raises(DataError, match="hfds/some/set/validation/3 must be an image"):
        list(batches(samples, [SMALL], Loading(6)))


def test_a_dataset_of_tensors_goes_to_every_network_as_it_is() -> None:
    images = torch.randn(6, 3, 5, 5)
    for data in (TensorDataset(images), images):
        samples = sample(open_source(data), 6, 0)
        (batch,) = batches(samples, [SMALL, LARGE], Loading(8))
        for part in batch:
            torch.testing.assert_close(part, images[list(samples.indices)])


def test_a_dataset_of_something_else_says_what_it_is() -> None:
    samples = sample(open_source([("text", 1)] * 5), 5, 0)
    with pytest.raises(DataError, match="must be a PIL image or a .* but is str"):
        list(batches(samples, [SMALL], Loading(5)))


def test_tensors_of_several_shapes_are_refused() -> None:
    data = [torch.zeros(1, 2, 2)] * 4 + [torch.zeros(1, 3, 3)]
    with pytest.raises(DataError, match="must have one shape, but have .*, "):
        list(batches(sample(open_source(data), 5, 0), [SMALL], Loading(5)))
