"""Training with --skip-broken: the next image takes the place, and a resumed run gives the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cka_probe.distill.config import Training
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]


@pytest.fixture
def broken(colours: Path, tmp_path: Path) -> Path:
    """Two training images are broken, the second the neighbour of the first."""
    root = tmp_path / "broken"
    shutil.copytree(colours, root)
    for number in (12, 13):
        (root / "train" / "1 green" / f"{number}.png").write_bytes(b"no image")
    return root


@pytest.mark.slow
def test_a_student_is_that_of_a_folder_that_holds_the_next_image_twice(
    broken: Path, options: Options, tmp_path: Path
) -> None:
    asked = {"method": "none", "teacher": None, "epochs": 1, "skip_broken": True, "warmup_epochs": 0}
    distill(options(data=str(broken), **asked), tmp_path / "one")
    mended = tmp_path / "mended"
    shutil.copytree(broken, mended)
    for number in (12, 13):  # "14.png" comes after them
        shutil.copy(mended / "train" / "1 green" / "14.png", mended / "train" / "1 green" / f"{number}.png")
    distill(options(data=str(mended), **asked), tmp_path / "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.full
def test_a_resumed_run_replaces_the_same_images(
    broken: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(data=str(broken), method="kd", epochs=2, skip_broken=True, image_cache=1e-6)
    distill(config, tmp_path / "whole")
    killed_after(8, monkeypatch, config, tmp_path / "killed")
    distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    killed_after(8, monkeypatch, config, tmp_path / "changed")
    (broken / "train" / "1 green" / "14.png").write_bytes(b"no image either")
    with pytest.raises(SpecError, match="Changed since the run was started: the training images"):
        distill(config, tmp_path / "changed", resume=True)
