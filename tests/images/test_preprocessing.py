"""What a network sees of an image: its own size, channels and normalization."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.images.preprocessing import Preprocessing


def test_an_image_becomes_a_normalized_tensor() -> None:
    image = Image.new("RGB", (50, 40), (255, 0, 0))
    tensor = Preprocessing(size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).transform()(image)
    assert tensor.shape == (3, 16, 16)
    torch.testing.assert_close(tensor.mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))
    assert Preprocessing(size=(1, 16, 16)).transform()(image).shape == (1, 16, 16)


def test_a_transform_can_be_sent_to_a_worker_process() -> None:
    image = Image.new("RGB", (20, 20), (9, 8, 7))
    transform = Preprocessing(size=(3, 16, 16)).transform()
    torch.testing.assert_close(pickle.loads(pickle.dumps(transform))(image), transform(image))


def test_a_sixteen_bit_image_keeps_its_grays() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    plain = Preprocessing(size=(1, 16, 16), mean=(0.0,), std=(1.0,), crop_pct=1.0)
    assert plain.transform()(ramp).unique().numel() > 200
    with pytest.raises(ValueError, match="no known range"):
        plain.transform()(Image.fromarray(np.ones((16, 16), dtype=np.int32)))


def test_a_configuration_from_the_hub_holds_lists() -> None:
    config = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    assert hash(Preprocessing.from_config(config)) is not None
