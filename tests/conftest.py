"""What the tests share: a seed, folders of images, CIFAR-100 where it is."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _messages_reach_pytest() -> None:
    """Undo what the command line did to the logger in an earlier test or a fixture: ``caplog`` would get nothing."""
    logger = logging.getLogger("cka_probe")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Encode lone surrogates that a test logs: pytest-xdist cannot send them and stops."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 40 x 32 PNG images in two class folders, and a text file that is no image."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (root / label).mkdir()
        for index in range(6):
            Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(root / label / f"{index}.png")
    (root / "README.txt").write_text("no image")
    return root


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


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-100's test images, and five training images a class, as an ImageFolder tree."""
    data = os.environ.get("CKA_PROBE_TEST_DATA")
    if not data:
        pytest.skip("CKA_PROBE_TEST_DATA does not name a folder with CIFAR-100")
    root = tmp_path_factory.mktemp("cifar100")
    command = [sys.executable, str(Path(data) / "unpack_cifar100.py"), str(root), "--per-class", "5"]
    subprocess.run(command, check=True, capture_output=True)
    return root
