"""Images of 16 bits look the same to probing, training and evaluation, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
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
from cka_probe.images.parts import Parts, open_parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.folder import Folder
from cka_probe.images.sources.pairs import paired_folder
from cka_probe.images.sources.source import ImageSource, open_source
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World
from tests.images.sixteen_bits import VALUES, gray, write, write_shard

PLAIN = Preprocessing(size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
RAW = PLAIN.transform()
EIGHT_BITS = {1, 117, 255}
"""VALUES divided by 257: 1.17, 116.7 and 255."""


def probed(source: ImageSource) -> set[int]:
    """The 8-bit values of the first six images, as networks under comparison see them."""
    (batch,) = batches(sample(source, 6, 0), [RAW], Loading(6))
    return set((batch[0] * 255).round().int().unique().tolist())


def trained_on(parts: Parts) -> set[int]:
    """The 8-bit values that a student in training sees."""
    config = Training(student="x", batch_size=3, workers=0, color_jitter=0.0)
    seen = [batch.images for batch in TrainingImages(parts.train, config, (3, 8, 8)).epoch(0)]
    return set(torch.cat(seen).unique().tolist())


class Recording(nn.Module):
    """Keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.zeros(len(x), 3)


def evaluated_on(parts: Parts) -> set[int]:
    """The 8-bit values that a network under evaluation sees."""
    network = Recording()
    subject = Subject("recording", network, PLAIN)
    accuracy_of(subject, parts.test, World(torch.device("cpu")), Evaluation(workers=0))
    return set((torch.cat(network.seen) * 255).round().int().unique().tolist())


@pytest.mark.parametrize("suffix", ["png", "tif", "big.tif", "pgm"])
@pytest.mark.parametrize("memory", [0, 1])
def test_a_folder_looks_the_same_everywhere(tmp_path: Path, suffix: str, memory: float) -> None:
    root = write(tmp_path, suffix=suffix)
    parts = open_parts(root, memory=memory)
    assert probed(open_source(root)) == trained_on(parts) == evaluated_on(parts) == EIGHT_BITS


def test_full_scale_is_white_everywhere(tmp_path: Path) -> None:
    root = write(tmp_path, {"a": 455, "b": 4095, "c": 5000})
    parts = open_parts(root, full_scale=4095)
    expected = {28, 255}  # 255 * 455 / 4095 = 28.3
    source = open_source(root, full_scale=4095)
    assert probed(source) == trained_on(parts) == evaluated_on(parts) == expected
    assert probed(paired_folder(source, root)) == expected
    assert trained_on(open_parts(root / "train", full_scale=4095)) == expected


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_are_read_with_full_scale_and_named_without(tmp_path: Path, dtype: type) -> None:
    root = write(tmp_path)
    for path in list(root.rglob("*.png")):
        path.unlink()
        Image.fromarray(np.full((8, 8), VALUES[path.parent.name], dtype)).save(path.with_suffix(".tif"))
    parts = open_parts(root, full_scale=65535)
    assert probed(open_source(root, full_scale=65535)) == trained_on(parts) == evaluated_on(parts) == EIGHT_BITS
    said = r"[0-3]\.tif must be an image, but could not be read: ValueError: pixels of mode .* \(--full-scale\)"
    for use in (probed, trained_on, evaluated_on):
        with pytest.raises(DataError, match=said):
            use(open_source(root) if use is probed else open_parts(root))  # type: ignore[operator]


def test_a_data_set_of_timm_s_is_read_before_it_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path)

    def created(_: str, *, split: str, **__: Any) -> ImageDataset:
        return ImageDataset(str(root / {"validation": "val"}.get(split, split)))

    monkeypatch.setattr("timm.data.create_dataset", created)
    parts = open_parts("hfds/some/set")
    assert parts.classes == ("0", "1", "2")
    assert probed(open_source("hfds/some/set")) == trained_on(parts) == evaluated_on(parts) == EIGHT_BITS


def test_torchvision_s_folders_are_read_before_they_are_converted(tmp_path: Path) -> None:
    root = write(tmp_path)
    parts = open_parts("torch/image_folder", data_dir=str(root))
    assert parts.classes == ("a", "b", "c")
    assert probed(open_source("torch/image_folder", data_dir=str(root))) == EIGHT_BITS
    assert trained_on(parts) == evaluated_on(parts) == EIGHT_BITS
    image, label = parts.train.read(5)
    assert isinstance(image, Image.Image)
    assert (image.mode, label) == ("RGB", 1)


def test_a_dataset_of_one_s_own_may_yield_16_bits() -> None:
    images: Any = [(gray(value), label) for label, value in enumerate(VALUES.values()) for _ in range(2)]
    source = open_source(images)
    assert probed(source) == EIGHT_BITS
    assert [source.read(index)[1] for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert probed(open_source(images, full_scale=300)) == {255}


class Grays(IterableDataset[Any]):
    """A stream of images, which its reader converts unless it is told not to, as timm's does."""

    def __init__(self, mode: str) -> None:
        self.reader = type("Reader", (), {"input_img_mode": mode})()

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        mode = self.reader.input_img_mode
        images = (gray(value) for value in VALUES.values() for _ in range(2))
        return ((image.convert(mode) if mode else image, 0) for image in images)


def test_a_stream_may_yield_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probed(open_source(Grays(""))) == EIGHT_BITS
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Grays("RGB"))
    source: Any = open_source("hfids/some/set")
    assert probed(source) == EIGHT_BITS
    assert next(iter(source)).mode == "RGB"


def test_shards_may_hold_16_bits(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    write_shard(tmp_path, VALUES)
    assert probed(open_source("wds/any", data_dir=str(tmp_path))) == EIGHT_BITS
    assert probed(open_source("wds/any", data_dir=str(tmp_path), full_scale=300)) == {255}


@pytest.mark.parametrize("opened", [open_source, open_parts])
def test_full_scale_is_checked_where_data_are_opened(opened: Any) -> None:
    with pytest.raises(SpecError, match="--full-scale must be a finite number above 0, but is -1"):
        opened("digits", full_scale=-1)


def test_a_source_that_is_open_keeps_its_full_scale() -> None:
    source = open_source("digits")
    assert open_source(source) is source
    with pytest.raises(SpecError, match="digits is open already. Give full_scale where it is opened"):
        open_source(source, full_scale=4095)


def test_views_see_8_bits(tmp_path: Path) -> None:
    from cka_probe.images.views import parse_views

    modes: list[str] = []

    def noted(image: Image.Image) -> Image.Image:
        modes.append(image.mode)
        return image

    (view,) = parse_views([noted])
    transform = Preprocessing(size=(1, 8, 8), mean=(0.0,), std=(1.0,), crop_pct=1.0).transform(view)
    (batch,) = batches(sample(open_source(write(tmp_path)), 6, 0), [transform], Loading(6))
    assert set((batch[0] * 255).round().int().unique().tolist()) == EIGHT_BITS
    assert set(modes) == {"L"}


def test_folders_need_labels_for_training_alone(tmp_path: Path) -> None:
    root = write(tmp_path)
    assert open_source(root).classes is None
    assert open_source(root).read(0)[1] is None
    labelled = Folder(root / "train", ("a", "b", "c"))
    assert [labelled.read(index)[1] for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    unlabelled = Parts(open_source(root, split="train"), None, open_source(root), ("a", "b", "c"))
    for use in (trained_on, evaluated_on):
        with pytest.raises(DataError, match=r"/[abc]/[0-3]\.png must have a class, a whole number, but has none"):
            use(unlabelled)
