"""Images come in a fixed, seeded order, each read once, and a bad one is named."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from cka_probe.data import batches, fingerprint, holds_tensors, sample
from cka_probe.errors import DataError, SpecError
from cka_probe.models import Preprocessing
from cka_probe.sources import digits, open_source

SMALL = Preprocessing(size=(3, 16, 16)).transform()
LARGE = Preprocessing(size=(3, 24, 24)).transform()


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
    with pytest.raises(DataError, match=r"must hold images \(\.png, "):
        open_source(tmp_path)
    with pytest.raises(SpecError, match="'nowhere' is none of these"):
        open_source("nowhere")


def test_a_sample_is_seeded_and_its_hash_tells_the_images_and_their_order(image_folder: Path) -> None:
    source = open_source(image_folder)
    first, again, other = sample(source, 8, 0), sample(source, 8, 0), sample(source, 8, 1)
    assert first.indices.tolist() == again.indices.tolist()
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert len(set(first.indices.tolist())) == 8
    assert sample(source, 6, 0).indices.tolist() == first.indices[:6].tolist(), "fewer examples are the first of more"


def test_too_few_examples_are_refused_and_more_than_there_are_is_told(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(image_folder)
    with pytest.raises(DataError, match="at least 4 examples, but 3 were asked for"):
        sample(source, 3, 0)
    with caplog.at_level("INFO", "cka_probe"):
        assert len(sample(source, 100, 0)) == 12
    assert "holds 12 images; 100 were asked for" in caplog.text
    with pytest.raises(DataError, match="but 3 were found in"):
        sample(open_source(TensorDataset(torch.zeros(3, 3, 8, 8))), 100, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_subject_s_tensor_comes_from_the_same_image(image_folder: Path, workers: int) -> None:
    samples = sample(open_source(image_folder), 12, 0)
    got = list(batches(samples, [SMALL, LARGE], batch_size=8, workers=workers))
    assert [[tuple(part.shape) for part in batch] for batch in got] == [
        [(8, 3, 16, 16), (8, 3, 24, 24)],
        [(4, 3, 16, 16), (4, 3, 24, 24)],
    ]
    image = samples.source.image(samples.indices[9])
    assert isinstance(image, Image.Image)
    torch.testing.assert_close(got[1][0][1], SMALL(image))
    torch.testing.assert_close(got[1][1][1], LARGE(image))


def test_a_last_batch_below_four_is_dropped(image_folder: Path) -> None:
    samples = sample(open_source(image_folder), 11, 0)
    assert [len(batch[0]) for batch in batches(samples, [SMALL], batch_size=8, workers=0)] == [8]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"no image", None])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    for index in range(5):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(tmp_path / f"{index}.png")
    broken = tmp_path / "2.png"
    broken.write_bytes(content if content is not None else broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png must be an image, but could not be read") as caught:
        list(batches(sample(open_source(tmp_path), 5, 0), [SMALL], batch_size=5, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_gray_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        suffix = "tif" if mode in ("CMYK", "I;16") else "png"
        Image.new(mode, (20, 20)).save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
    (batch,) = batches(sample(open_source(tmp_path), 7, 0), [SMALL], batch_size=8, workers=0)
    assert batch[0].shape == (7, 3, 16, 16)


def test_a_dataset_of_tensors_goes_to_every_network_as_it_is() -> None:
    images = torch.randn(6, 3, 5, 5)
    for data in (TensorDataset(images), images):
        samples = sample(open_source(data), 6, 0)
        (batch,) = batches(samples, [SMALL, LARGE], batch_size=8, workers=0)
        for part in batch:
            torch.testing.assert_close(part, images[list(samples.indices)])


def test_a_dataset_of_something_else_says_what_it_is() -> None:
    samples = sample(open_source([("text", 1)] * 5), 5, 0)
    with pytest.raises(DataError, match="must be a PIL image or a .* but is str"):
        list(batches(samples, [SMALL], batch_size=5, workers=0))


def test_a_torchvision_data_set_is_read_through_timm(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 9, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 9) + bytes(9))
    source = open_source("torch/mnist", data_dir=str(tmp_path))
    assert len(source) == 9
    (batch,) = batches(sample(source, 9, 0), [SMALL], batch_size=16, workers=0)
    assert batch[0].shape == (9, 3, 16, 16)


def test_a_data_set_that_is_missing_says_where_and_how(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--data-dir DIR"):
        open_source("torch/cifar100")
    with pytest.raises(DataError, match=r"torch/cifar100 .* could not be opened.*--download"):
        open_source("torch/cifar100", data_dir=str(tmp_path))


def test_a_stream_is_read_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset[tuple[Image.Image, int]]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return ((Image.new("RGB", (8, 8), (index, 0, 0)), 0) for index in range(50))

        def __len__(self) -> int:
            return 50

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    samples = sample(open_source("hfids/stream", data_dir="anywhere"), 10, seed=3)
    assert samples.indices.tolist() == list(range(10))
    red = [batch[0][:, 0, 0, 0] for batch in batches(samples, [SMALL], batch_size=5, workers=0)]
    assert [len(part) for part in red] == [5, 5]
    assert torch.cat(red).diff().gt(0).all()


class Numbers(IterableDataset[tuple[Tensor, int]]):
    """A stream of (1, 2, 2) tensors that says it has 50."""

    def __init__(self, has: int = 50) -> None:
        self.has = has

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((torch.full((1, 2, 2), float(index)), 0) for index in range(self.has))

    def __len__(self) -> int:
        return 50


def test_an_iterable_dataset_of_one_s_own_is_a_stream() -> None:
    (batch,) = batches(sample(open_source(Numbers()), 6, 0), [SMALL], batch_size=8, workers=0)
    assert batch[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("has", [0, 3, 11])
def test_a_stream_that_ends_early_is_an_error(has: int) -> None:
    samples = sample(open_source(Numbers(has)), 12, 0)
    with pytest.raises(DataError, match=f"Numbers must yield 12 images.*ended after {has}"):
        list(batches(samples, [SMALL], batch_size=4, workers=0))


def test_a_stream_that_breaks_names_the_image() -> None:
    class Broken(Numbers):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            yield torch.zeros(1, 2, 2), 0
            raise OSError("truncated")

    with pytest.raises(DataError, match="Broken/1 must be an image.*truncated"):
        list(batches(sample(open_source(Broken()), 8, 0), [SMALL], batch_size=4, workers=0))


def test_a_stream_without_a_length_yields_what_is_asked_for_or_says_where_it_ended() -> None:
    class Unknown(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return (torch.full((1, 2, 2), float(index)) for index in range(9))

    (batch,) = batches(sample(open_source(Unknown()), 8, 0), [SMALL], batch_size=8, workers=0)
    assert batch[0][:, 0, 0, 0].tolist() == list(range(8))
    with pytest.raises(DataError, match="Unknown must yield 12 images, but ended after 9. Ask for fewer"):
        list(batches(sample(open_source(Unknown()), 12, 0), [SMALL], batch_size=4, workers=0))


def test_a_dataset_without_a_length_that_is_read_by_number_is_refused() -> None:
    class Endless:
        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(1, 2, 2)

    with pytest.raises(SpecError, match="Endless has no __len__"):
        open_source(Endless())  # type: ignore[arg-type]


def test_samples_know_whether_they_are_tensors(image_folder: Path) -> None:
    for data, expected in ((image_folder, False), (torch.zeros(5, 1, 2, 2), True), (Numbers(), True)):
        assert holds_tensors(sample(open_source(data), 5, 0)) is expected


def test_where_a_data_set_lies_is_for_data_sets(image_folder: Path) -> None:
    with pytest.raises(SpecError, match="--data-dir and --download are for data sets"):
        open_source(image_folder, download=True)


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
        list(batches(samples, [SMALL], batch_size=6, workers=0))


def test_images_that_change_behind_the_same_names_have_another_fingerprint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        for index in range(120):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{index:03}.bmp")

    def found(seed: int = 0, paired: bool = True) -> str:
        samples = sample(open_source(tmp_path / "one"), 200, seed)
        return fingerprint(replace(samples, paired=open_source(tmp_path / "two")) if paired else samples)

    whole = found()
    assert re.fullmatch("[0-9a-f]{16}", whole)
    order = sample(open_source(tmp_path / "one"), 200, 0).indices
    early, late = (f"{order[place]:03}.bmp" for place in (99, 100))
    for side, name, change, noticed in (
        ("one", early, b"\1", True),  # the same size, other bytes
        ("two", early, b"\1", True),
        ("one", late, b"\1", False),  # beyond the first hundred the size alone is looked at
        ("one", late, b"\1\1", True),
        ("two", late, b"\1\1", True),
    ):
        path = tmp_path / side / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + change)
        assert (found() != whole) is noticed, (side, name, change)
        path.write_bytes(before)
    os.utime(tmp_path / "one" / early, (0, 0))
    assert found() == whole, "no time is part of it"
    assert found(seed=1) != whole
    assert found(paired=False) != whole


def test_images_of_other_sources_are_known_by_their_first_hundred() -> None:
    images = torch.rand(120, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    samples = sample(open_source(TensorDataset(images)), 120, 0)
    whole = fingerprint(samples)
    for place, noticed in ((99, True), (100, False)):
        changed = images.clone()
        changed[samples.indices[place]] += 1
        assert (fingerprint(sample(open_source(TensorDataset(changed)), 120, 0)) != whole) is noticed
    digits_found = [fingerprint(sample(open_source("digits"), 8, seed)) for seed in (0, 0, 1)]
    assert digits_found[0] == digits_found[1] != digits_found[2]
    assert fingerprint(sample(open_source(Numbers()), 8, 0)), "a stream is not read"


def test_tensors_of_several_shapes_are_refused() -> None:
    data = [torch.zeros(1, 2, 2)] * 4 + [torch.zeros(1, 3, 3)]
    with pytest.raises(DataError, match="must have one shape, but have .*, "):
        list(batches(sample(open_source(data), 5, 0), [SMALL], batch_size=5, workers=0))


@pytest.mark.data
def test_cifar100_is_read_as_a_folder(cifar100: Path) -> None:
    source = open_source(cifar100)
    assert (len(source), source.name) == (10_000, str(cifar100 / "val"))
    assert len(open_source(cifar100, split="train")) == 500
