"""Networks of one, two and four channels: gray, and opacity from the files that have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.distill.config import Training
from cka_probe.distill.training.pipeline import augmentation
from cka_probe.distill.training.train import distill
from cka_probe.errors import CkaProbeError, DataError
from cka_probe.images.preprocessing import Preprocessing, as_pixels
from cka_probe.images.sources.bit_depth import MODES
from cka_probe.images.views import parse_views

COLOURS = (0.5, 0.4, 0.3)
RNG = np.random.default_rng(0)


def image(channels: int, size: int = 24) -> Image.Image:
    pixels = RNG.integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


@pytest.mark.parametrize(
    ("channels", "mean"),
    [(1, (0.4,)), (2, (0.4, 0.4)), (3, COLOURS), (4, (*COLOURS, 0.4)), (5, (*COLOURS, 0.4, 0.4))],
)
def test_mean_and_deviation_follow_the_channels(channels: int, mean: tuple[float, ...]) -> None:
    seen = Preprocessing((channels, 8, 8), mean=COLOURS, std=COLOURS)
    assert seen.mean == pytest.approx(mean)
    assert seen.std == pytest.approx(mean)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_each_channel_is_normalized(channels: int) -> None:
    seen = Preprocessing((channels, 24, 24), mean=COLOURS, std=(0.2, 0.3, 0.4), crop_pct=1.0)
    picture = image(channels)
    tensor = seen.transform()(picture)
    values = np.asarray(picture, dtype=np.float32).reshape(24, 24, channels) / 255
    expected = (values - np.array(seen.mean, np.float32)) / np.array(seen.std, np.float32)
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    shown = as_pixels(tensor[None], seen)[0]
    kept = 1 if channels < 3 else 3
    np.testing.assert_array_equal(shown, np.asarray(picture).reshape(24, 24, channels)[..., :kept])


def test_opacity_is_never_made_up() -> None:
    for channels in (2, 4):
        transform = Preprocessing((channels, 8, 8)).transform()
        with pytest.raises(DataError, match="opacity"):
            transform(image(3))
    palette = image(4).convert("RGB").quantize(8)
    palette.info["transparency"] = 0
    assert Preprocessing((4, 8, 8)).transform()(palette).shape == (4, 8, 8)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_every_augmentation_takes_every_mode(channels: int) -> None:
    options: dict[str, Any] = {"student": "zoo:cnn", "crop_scale": (0.5, 1.0)}
    for more in ({"rand_augment": "rand-m9-n3-mstd0.5-inc1"}, {"color_jitter": 0.4}):
        transform = augmentation(Training(**options, **more), (channels, 16, 16))
        for _ in range(60):
            assert transform(image(channels)).shape == (channels, 16, 16)


def test_the_fill_of_a_rotation_is_the_mean_in_each_channel() -> None:
    config = Training(student="zoo:cnn", rand_augment="rand-m9", crop_scale=(1.0, 1.0), flip=0)
    for channels, fill in ((1, 114), (3, (124, 116, 104))):
        transform: Any = augmentation(config, (channels, 16, 16))
        operations = {
            operation.name: operation for step in transform.transforms for operation in getattr(step, "ops", ())
        }
        assert operations["Rotate"].kwargs["fillcolor"] == fill


@pytest.mark.parametrize("view", ["blur:2", "jpeg:30", "noise:0.2", "gray"])
def test_a_view_leaves_opacity_alone(view: str) -> None:
    (parsed,) = parse_views(view)
    for channels in (2, 4):
        picture = image(channels)
        seen = parsed(picture, "x")
        assert seen.mode == MODES[channels]
        assert seen.getchannel("A").tobytes() == picture.getchannel("A").tobytes()


@pytest.fixture(scope="module")
def opaque_and_not(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("opacity")
    for split, count in (("train", 8), ("val", 4)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                image(4, 32).save(root / split / label / f"{index}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_network_of_other_channels_is_trained_to_the_end(opaque_and_not: Path, tmp_path: Path, channels: int) -> None:
    config = Training(
        student=f"zoo:cnn,in_chans={channels}@random", data=str(opaque_and_not), method="none", epochs=1, batch_size=8,
        rand_augment="rand-m9-n2", erasing=0.5, mixup=0.2, workers=0, device="cpu",
    )  # fmt: skip
    done = distill(config, tmp_path / "run")
    assert done.student is not None
    assert done.student(torch.zeros(1, channels, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("channels", "message"), [(4, "has none: its mode is RGB"), (5, "takes 5 channels, but images")]
)
def test_channels_that_images_lack_are_refused_before_the_training(
    colours: Path, tmp_path: Path, channels: int, message: str
) -> None:
    config = Training(
        student=f"zoo:cnn,in_chans={channels}@random", data=str(colours), method="none", epochs=1, batch_size=8,
        workers=0, device="cpu",
    )  # fmt: skip
    with pytest.raises(CkaProbeError, match=message):
        distill(config, tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()
