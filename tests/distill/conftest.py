"""The options of a run that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cka_probe.distill.config import Training, from_record

NETWORKS = Path(__file__).with_name("networks.py")


def spec(factory: str) -> str:
    """The model spec of a factory in networks.py."""
    return f"{NETWORKS}:{factory}"


@pytest.fixture
def options(colours: Path) -> Callable[..., Training]:
    """A config of a small run, with some values changed."""

    def make(**changes: Any) -> Training:
        base: dict[str, Any] = {
            "student": spec("tiny_vit"), "teacher": spec("teacher"), "data": str(colours), "method": "ofa",
            "epochs": 3, "batch_size": 12, "lr": 3e-3, "weight_decay": 0.01, "workers": 0, "device": "cpu",
            "crop_scale": (0.6, 1.0), "probe_examples": 32, "validation": 0, "warmup_epochs": 1, "clip": 1.0,
        }  # fmt: skip
        return from_record(base | changes)

    return make
