"""What probing, training and evaluation have in common: the same images are found, and a bad one is named alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import accuracy_of
from cka_probe.distill.options import Evaluation
from cka_probe.distill.training.pipeline import TrainingImages
from cka_probe.errors import DataError, SpecError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.parts import open_parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import ImageSource, open_source
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World

SMALL = Preprocessing(size=(3, 16, 16))
LOOK = SMALL.transform()


class Guess(nn.Module):
    """Says class 0 of 2."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)


def probe(source: ImageSource, workers: int) -> None:
    list(batches(sample(source, len(source), 0), [LOOK], Loading(4, workers)))


def train(source: ImageSource, workers: int) -> None:
    config = Training(student="x", batch_size=1, workers=workers)
    list(TrainingImages(source, config, (3, 16, 16)).epoch(0))


def evaluation(source: ImageSource, workers: int) -> None:
    accuracy_of(Subject("guess", Guess(), SMALL), source, World(torch.device("cpu")), Evaluation(workers=workers))


USES: list[Callable[[ImageSource, int], None]] = [probe, train, evaluation]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images a class below train, and four below val."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cats", "dogs"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{index}.png")
    return tmp_path / "pets"


def messages(root: Path, workers: int = 0) -> set[str]:
    """What each use says of the training images."""
    said = set()
    for use in USES:
        source = open_source(root, split="train") if use is probe else open_parts(root).train
        with pytest.raises(DataError) as caught:
            use(source, workers)
        said.add(str(caught.value))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["no image", "cut short", "broken link", "of floating-point values"])
def test_a_bad_image_is_named_alike(root: Path, workers: int, damage: str) -> None:
    path = root / "train" / "dogs" / "3.png"
    whole = path.read_bytes()
    path.unlink()
    if damage == "broken link":
        path.symlink_to("nowhere")
    elif damage == "of floating-point values":
        path = path.with_suffix(".tif")
        Image.fromarray(np.ones((20, 24), dtype=np.float32)).save(path)
    else:
        path.write_bytes(b"no image" if damage == "no image" else whole[:200])
    (said,) = messages(root, workers)
    assert said.startswith(f"{path} must be an image, but could not be read: ")
    assert "\n" not in said


def test_an_image_of_too_many_pixels_is_named_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(root / "train" / "cats" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    (said,) = messages(root)
    assert "cats/large.png must be an image, but could not be read: it has more than 1,000 pixels" in said


@pytest.mark.slow
def test_a_bad_image_of_a_data_set_of_timm_s_is_named_not_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train" / "dogs" / "3.png").write_bytes(b"no image")

    def created(_: str, *, split: str, **__: Any) -> ImageDataset:
        return ImageDataset(str(root / {"validation": "val"}.get(split, split)))

    monkeypatch.setattr("timm.data.create_dataset", created)
    said = set()
    for use in USES:
        source = open_source("hfds/pets", split="train") if use is probe else open_parts_of("hfds/pets")
        with pytest.raises(DataError) as caught:
            use(source, 0)
        said.add(str(caught.value).split(":")[0])
    assert said == {"hfds/pets/train/11 must be an image, but could not be read"}


def open_parts_of(spec: str) -> ImageSource:
    """The training images, of classes that are known: timm's reader of folders does not list its labels."""
    from cka_probe.images.sources.datasets import open_dataset

    source = open_dataset(spec, "train")
    assert not isinstance(source, IterableDataset)
    return source


def test_names_that_are_not_utf_8_links_and_pipes_are_no_matter(root: Path) -> None:
    for part in ("train", "val"):
        folder = os.fsencode(root / part / "dogs")
        os.rename(os.path.join(folder, b"0.png"), os.path.join(folder, b"x\xff\n.png"))
        os.symlink(b"..", os.path.join(folder, b"up"))
        os.symlink(b"1.png", os.path.join(folder, b"linked.png"))
        os.mkfifo(os.path.join(folder, b"pipe.png"))
    parts = open_parts(root)
    assert (len(parts.train), len(parts.test)) == (17, 9)
    for use in USES:
        use(parts.train, 0)
    assert sorted(parts.train.identity(index) for index in range(17)) == list(open_source(root, split="train").paths)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_folder_stands_before_a_path_of_any_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits", "hfds"):
        (root.parent / name).symlink_to(root)
    monkeypatch.chdir(root.parent)
    (root.parent / "hfds" / "pets").symlink_to(root)
    for path, found in (("digits", 16), ("hfds/pets", 16), (str(root), 16)):
        parts = open_parts(f"folder:{path}")
        assert (len(parts.train), parts.classes) == (found, ("cats", "dogs"))
        assert len(open_source(f"folder:{path}", split="train")) == found
    assert len(open_parts("digits").train) == 1438


@pytest.mark.parametrize("spec", ["hfids/any", "tfds/any"])
def test_training_refuses_what_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    with pytest.raises(SpecError, match=f"random order, but {spec} can only be read in sequence"):
        open_parts(spec)


def test_a_data_set_is_opened_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such folder.")

    monkeypatch.setattr("timm.data.create_dataset", missing)
    said = set()
    for opened in (lambda: open_source("hfds/any", split="train"), lambda: open_parts("hfds/any")):
        with pytest.raises(DataError, match="could not be opened: FileNotFoundError: no such folder. It can") as caught:
            opened()
        said.add(str(caught.value))
    assert len(said) == 1


def test_an_image_without_a_label_is_probed_but_not_trained_on() -> None:
    images: Any = [Image.new("RGB", (20, 20), (index, 0, 0)) for index in range(4)]
    source = open_source(images)
    probe(source, 0)
    for use in (train, evaluation):
        with pytest.raises(DataError, match="list/[0-3] must have a class, a whole number, but has none"):
            use(source, 0)


@pytest.mark.parametrize(
    ("label", "read"), [(3, 3), (np.int64(3), 3), (torch.tensor(3), 3), ("cat", None), (0.5, None)]
)
def test_a_label_is_a_whole_number(label: Any, read: int | None) -> None:
    data: Any = [(Image.new("RGB", (4, 4)), label)]
    assert open_source(data).read(0)[1] == read
