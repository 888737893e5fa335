"""Labelled images from the digits and from folders, in memory or not; and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cka_probe.errors import DataError, SpecError
from cka_probe.images.parts import Parts, _with_validation, fingerprint, open_parts, stratified
from cka_probe.images.samples import fingerprint as samples_fingerprint
from cka_probe.images.samples import sample
from cka_probe.images.sources.datasets import DatasetImages
from cka_probe.images.sources.source import ImageSource


def opened(spec: str | Path, memory: float = 1.0) -> Parts:
    return open_parts(spec, memory=memory)


def test_the_digits_have_ten_classes_and_every_fifth_is_for_the_test() -> None:
    parts = opened("digits")
    assert (len(parts.train), len(parts.test), len(parts.classes)) == (1438, 359, 10)
    assert parts.validation is None


def identities(part: ImageSource | None) -> list[str]:
    assert part is not None
    return [part.identity(index) for index in range(len(part))]


@pytest.mark.parametrize("memory", [1, 1e-9])
def test_validation_images_are_cut_from_those_of_training_by_class_and_seed(colours: Path, memory: float) -> None:
    whole = opened(colours)
    cuts = [open_parts(colours, validation=0.25, seed=seed, memory=memory) for seed in (3, 3, 4)]
    for parts in cuts:
        assert parts.counts == {"train": 54, "validation": 18, "test": 36}
        assert sorted(identities(parts.train) + identities(parts.validation)) == sorted(identities(whole.train))
        assert identities(parts.test) == identities(whole.test), "its images are the same whatever is cut"
        assert parts.validation is not None
        assert np.bincount([parts.validation.read(index)[1] for index in range(18)]).tolist() == [6, 6, 6]
    assert identities(cuts[0].validation) == identities(cuts[1].validation)
    assert identities(cuts[0].validation) != identities(cuts[2].validation)
    digits = open_parts("digits", validation=0.1)
    assert digits.counts == {"train": 1294, "validation": 144, "test": 359}


@pytest.mark.parametrize(
    ("counts", "share", "taken"),
    [
        ([5] * 100, 0.1, 50),  # half an image a class: every second class gives one
        ([1, 1, 8], 0.5, 4),  # a class of one image keeps it
        ([2, 2], 0.99, 2),
        ([1000, 10], 0.1, 101),
        ([3, 3], 0.001, 1),
        ([1, 1], 0.5, 0),
    ],
)
def test_each_class_gives_its_share_and_keeps_an_image(counts: list[int], share: float, taken: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    chosen = stratified(labels, share, 0)
    assert len(set(chosen.tolist())) == len(chosen) == taken
    given = np.bincount(labels[chosen], minlength=len(counts))
    assert (given <= np.array(counts) - 1).all()
    room = np.array(counts) > 1
    assert (np.abs(given - share * np.array(counts))[room] <= 1).all()


def test_one_image_a_class_gives_no_validation_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name / "0.png")
    parts = open_parts(tmp_path, validation=0.1)
    assert parts.counts == {"train": 2, "validation": 0, "test": 2}
    assert "has one image per class" in caplog.text
    assert open_parts(tmp_path / "train", validation=0.1).counts == {"train": 2, "validation": 0, "test": 0}


def test_a_folder_of_three_parts_has_them_as_they_are(
    colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(colours, tmp_path / "three")
    shutil.copytree(colours / "val", tmp_path / "three" / "test")
    next((tmp_path / "three" / "val" / "0 red").iterdir()).unlink()
    with caplog.at_level("INFO", "cka_probe"):
        parts = open_parts(tmp_path / "three", validation=0.5)
    assert parts.counts == {"train": 72, "validation": 35, "test": 36}
    assert caplog.text.count("--validation is not used") == 1
    (tmp_path / "three" / "val").rename(tmp_path / "three" / "no part")
    parts = open_parts(tmp_path / "three", validation=0.5)
    assert parts.counts == {"train": 36, "validation": 36, "test": 36}
    shutil.rmtree(tmp_path / "three" / "test" / "2 blue")
    with pytest.raises(DataError, match="must hold the same class folders"):
        open_parts(tmp_path / "three")


def test_labels_of_data_sets_are_known_without_reading_images() -> None:
    class Unreadable(list):
        targets = [0] * 10 + [1] * 10

        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("no image is to be read")

    images = DatasetImages(Unreadable([None] * 20), "mine")
    parts = _with_validation(Parts(images, None, images, ("0", "1")), 0.2, 0)
    assert parts.counts["validation"] == 4


def test_few_validation_images_are_not_what_networks_are_compared_on(colours: Path) -> None:
    few, enough, none = (open_parts(colours, validation=share) for share in (0.25, 0.9, 0))
    assert few.probed is few.train
    assert none.probed is none.train
    assert enough.validation is not None
    assert (len(enough.validation), enough.probed) == (65, enough.validation)


def test_a_folder_with_parts_keeps_one_numbering_of_classes(colours: Path) -> None:
    parts = opened(colours)
    assert parts.classes == ("0 red", "1 green", "2 blue")
    for part, count in ((parts.train, 24), (parts.test, 12)):
        assert [part.read(index)[1] for index in range(len(part))] == [0] * count + [1] * count + [2] * count
        image, label = part.read(count)
        assert np.asarray(image).mean((0, 1)).argmax() == label == 1


def test_images_in_memory_are_those_of_the_files(colours: Path) -> None:
    kept, read = opened(colours, memory=1).train, opened(colours, memory=1e-9).train
    assert (kept.in_memory, read.in_memory) == (True, False)
    for index in (0, 30, 71):
        np.testing.assert_array_equal(np.asarray(kept.read(index)[0]), np.asarray(read.read(index)[0]))
        assert kept.read(index)[1] == read.read(index)[1]


def test_a_plain_folder_is_divided_into_test_and_then_validation(colours: Path) -> None:
    parts = opened(colours / "train", memory=1e-9)
    assert (len(parts.train), len(parts.test)) == (65, 7)
    pixels = [
        np.asarray(part.read(index)[0]).tobytes() for part in (parts.train, parts.test) for index in range(len(part))
    ]
    assert len(set(pixels)) == 72
    cut = open_parts(colours / "train", validation=0.1)
    assert cut.counts == {"train": 59, "validation": 6, "test": 7}
    assert identities(cut.test) == identities(parts.test)


def test_a_missing_class_folder_is_named(colours: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(colours, copy)
    shutil.rmtree(copy / "val" / "1 green")
    with pytest.raises(DataError, match="must hold the same class folders, but 1 are in only one: 1 green"):
        opened(copy)


def test_folders_without_classes_images_or_training_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder of images for each class"):
        opened(tmp_path)
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="training images in a folder train"):
        opened(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="in its class folders"):
        opened(tmp_path)


def test_unknown_data_are_refused() -> None:
    with pytest.raises(SpecError, match="'nowhere' is none of these"):
        opened("nowhere")
    with pytest.raises(SpecError, match="--data-dir DIR"):
        opened("torch/cifar100")


def test_training_images_are_known_again_in_memory_or_not(colours: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(colours, copy)
    parts = [(part.train, part.test) for part in (opened(copy, memory=1), opened(copy, memory=1e-9), opened(copy))]
    (train, test), *others = [tuple(map(fingerprint, part)) for part in parts]
    assert all(other == (train, test) for other in others)
    assert train != test
    tenth = opened(copy / "train", memory=1e-9)
    assert len({fingerprint(tenth.train), fingerprint(tenth.test), train}) == 3
    path = next((copy / "train" / "1 green").iterdir())
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert fingerprint(opened(copy).train) != train
    assert fingerprint(opened(copy).test) == test
    path.write_bytes(content)
    os.utime(path, (0, 0))
    assert fingerprint(opened(copy).train) == train
    path.rename(copy / "train" / "2 blue" / f"other-{path.name}")
    assert fingerprint(opened(copy).train) != train, "it has another label now"
    assert fingerprint(opened("digits").train) == fingerprint(opened("digits").train)


def test_a_broken_training_image_is_named_in_one_line(colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "copy")
    path = sorted((tmp_path / "copy" / "train" / "0 red").iterdir())[0]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=rf"{path.name} must be an image, but could not be read") as caught:
        opened(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_class_folders_are_read_one_after_the_other(tmp_path: Path) -> None:
    for path in ("a/0.png", "a/sub/1.png", "a b/2.png", "b/3.png"):
        for part in ("train", "val"):
            (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / path)
    train = opened(tmp_path).train
    found = [train.identity(index) for index in range(4)]
    assert found == ["a/0.png", "a/sub/1.png", "a b/2.png", "b/3.png"], "as a blank sorts before a slash"
    assert [train.read(index)[1] for index in range(4)] == [0, 0, 1, 2]


def test_images_keep_their_names_in_memory_and_in_a_part(colours: Path) -> None:
    for parts in (opened(colours / "train", memory=1), opened(colours / "train", memory=1e-9)):
        names = [(part.identity(index), part.place(index)) for part in (parts.train, parts.test) for index in (0, 5)]
        assert all(place == str(colours / "train" / name) for name, place in names)
        assert len(set(names)) == 4


def test_a_sample_of_a_part_is_known_again_in_memory_or_not(colours: Path) -> None:
    samples = [sample(opened(colours, memory=memory).test, 16, 0) for memory in (1, 1e-9)]
    assert samples[0].sha256 == samples[1].sha256
    assert samples_fingerprint(samples[0]) == samples_fingerprint(samples[1])
    assert samples_fingerprint(samples[0]) != samples_fingerprint(sample(opened(colours).test, 16, 1))
