"""Images of three colours in class folders, and the options of a run that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cka_probe.distill.config import Training

NETWORKS = Path(__file__).with_name("networks.py")


def spec(factory: str) -> str:
    """The model spec of a factory in networks.py."""
    return f"{NETWORKS}:{factory}"


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 held-out images a class, 16 x 16, each noise with one channel brighter."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12)):
        for channel, name in enumerate(("0 red", "1 green", "2 blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def options(colours: Path) -> Callable[..., Training]:
    """A config of a small run, with some values changed."""

    def make(**changes: Any) -> Training:
        base: dict[str, Any] = {
            "student": spec("tiny_vit"), "teacher": spec("teacher"), "data": str(colours), "method": "ofa",
            "epochs": 3, "batch_size": 12, "lr": 3e-3, "weight_decay": 0.01, "workers": 0, "device": "cpu",
            "crop_scale": (0.6, 1.0), "probe_examples": 32, "warmup_epochs": 1, "clip": 1.0,
        }  # fmt: skip
        return Training(**(base | changes))

    return make
