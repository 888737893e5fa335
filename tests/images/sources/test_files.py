"""Image files: each found once, whatever links there are; each read or named, whatever it holds."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.errors import DataError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.fingerprints import image_digest
from cka_probe.images.parts import open_parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.files import image_paths, read_image
from cka_probe.images.sources.source import open_source

SMALL = Preprocessing(size=(3, 16, 16)).transform()


def image(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def folder_of(root: Path, *paths: str) -> Path:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image(seed).save(root / path)
    return root


def message_of(root: Path) -> str | None:
    """What is said of the images of a folder that cannot all be read."""
    try:
        list(batches(sample(open_source(root), 4, 0), [SMALL], Loading(4)))
    except DataError as error:
        return str(error)
    return None


# the walk


@pytest.mark.parametrize(
    "links",
    [
        {"again": "."},
        {"a/up": ".."},
        {"a/b": "../b", "b/a": "../a"},
        {"a/self": "."},
        {"a/far": "../../.."},
        {"one": "two", "two": "one"},
        {"0": "a", "1": "a"},
    ],
)
def test_links_that_lead_back_multiply_no_image(tmp_path: Path, links: dict[str, str]) -> None:
    root = folder_of(tmp_path / "x" / "images", "top.png", "a/1.png", "b/2.png")
    for name, target in links.items():
        (root / name).symlink_to(target)
    assert image_paths(root) == ["a/1.png", "b/2.png", "top.png"], "each by its path without a link"


def test_a_link_to_a_folder_elsewhere_is_followed_once(tmp_path: Path) -> None:
    elsewhere = folder_of(tmp_path / "elsewhere", "deep/1.png")
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    root = folder_of(tmp_path / "images", "0.png")
    for name in ("second", "first"):
        (root / name).symlink_to(elsewhere)
    (root / "alone.png").symlink_to(root / "0.png")  # a file that is linked is another image, as ever
    assert image_paths(root) == ["0.png", "alone.png", "first/deep/1.png"]


def test_what_is_no_regular_file_is_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, "0.png", "1.png", "a/2.png", "a/3.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a" / "device.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening, caplog.at_level("WARNING", "cka_probe"):
        listening.bind("socket.png")
        source = open_source(tmp_path)
    assert len(source) == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"3 files below {tmp_path} are skipped, since they are named pipes, sockets or devices, such as a/device.png."
    ]


def test_a_broken_link_is_named_when_it_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "3.png").symlink_to("nowhere")
    (tmp_path / "4.png").symlink_to("4.png")
    with pytest.raises(DataError, match=r"[34]\.png must be an image, but could not be read"):
        list(batches(sample(open_source(tmp_path), 5, 0), [SMALL], Loading(5)))


def test_a_folder_without_the_right_to_read_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path, "a/0.png", "b/1.png")
    scandir = os.scandir

    def denied(path: str) -> object:  # root may read everything
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    said = rf"The folder {tmp_path / 'b'} cannot be read \(Permission denied\)"
    with pytest.raises(DataError, match=said):
        open_source(tmp_path)
    with pytest.raises(DataError, match=said):
        open_parts(tmp_path)


def test_training_images_are_found_by_the_same_walk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of(tmp_path, *(f"{c}/{i}.png" for c in ("cats", "dogs", "emus") for i in range(8)))
    (root / "again").symlink_to(".")
    (root / "cats" / "dogs").symlink_to("../dogs")
    (root / "dogs" / "all").symlink_to("..")
    os.mkfifo(root / "emus" / "pipe.png")
    parts = open_parts(root)
    assert parts.classes == ("cats", "dogs", "emus")
    labels = [part.read(index)[1] for part in (parts.train, parts.test) for index in range(len(part))]
    assert sorted(labels) == [0] * 8 + [1] * 8 + [2] * 8
    assert "emus/pipe.png" in caplog.text


# reading


def test_every_kind_of_image_is_read(tmp_path: Path) -> None:
    colours, other = image(), image(1)
    for name, kind, options in (
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {"transparency": b"\0\x80" * 20}),
        ("palette2.png", "P", {"transparency": 3}),
        ("gray.png", "LA", {}),
        ("bits.png", "1", {}),
        ("lab.tif", "LAB", {}),
        ("animated.gif", "P", {"save_all": True, "append_images": [other.convert("P")]}),
        ("animated.webp", "RGB", {"save_all": True, "append_images": [other]}),
    ):
        colours.convert(kind).save(tmp_path / name, **options)
    Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9) * 800).save(tmp_path / "16.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (1, 300)).save(tmp_path / "line.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = batches(sample(open_source(tmp_path), 99, 0), [SMALL], Loading(16))
    assert batch[0].shape == (11, 3, 16, 16)
    assert torch.isfinite(batch[0]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_too_many_pixels_is_named_and_a_large_one_is_read(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path, "0.png", "1.png", "2.png")
    image(3, (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").size == (30, 30), "Pillow only warns of up to twice as many"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
        with pytest.raises(
            DataError, match=r"large\.png must be an image, .* more than 800 pixels.*smaller, or remove"
        ):
            list(batches(sample(open_source(tmp_path), 4, 0), [SMALL], Loading(4, workers)))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif", "bmp", "ppm"])
def test_an_image_with_damaged_bytes_is_read_or_named_in_one_line(tmp_path: Path, suffix: str) -> None:
    folder_of(tmp_path, "0.png", "1.png", "2.png")
    rng = np.random.default_rng(0)
    image(3).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    broken = tmp_path / f"whole.{suffix}"
    for _ in range(60):
        content = bytearray(whole)
        for position in rng.integers(0, min(len(content), 200), 4).tolist():
            content[position] = int(rng.integers(256))
        broken.write_bytes(content[: len(content) // 2] if rng.random() < 0.2 else content)
        said = message_of(tmp_path)
        assert said is None or (f"whole.{suffix} must be an image" in said and "\n" not in said)


def test_a_digest_is_that_of_the_pixels() -> None:
    one, other = image(), image(1)
    assert image_digest([one]) == image_digest([one.copy()])
    pixels = torch.rand(3, 4, 4)
    palette = one.convert("P")
    recoloured = palette.copy()
    recoloured.putpalette([255 - value for value in palette.getpalette() or []])
    different = [
        [one], [other], [one, other], [other, one], [one.convert("L")], [one.rotate(180)], [pixels], [pixels.double()],
        [pixels.reshape(3, 2, 8)], [pixels[:, :2]], [palette], [recoloured],
    ]  # fmt: skip
    assert len({image_digest(images) for images in different}) == len(different)
