"""A foreign teacher's words: with labels and without, between networks of any shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import cka_probe as cp
from cka_probe.distill.config import Training
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import report_page
from cka_probe.distill.training.run import loop
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from tests.distill.conftest import spec
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]
pytestmark = pytest.mark.slow


def words(options: Options, **changes: Any) -> Training:
    """A transformer without maps of 5 × 5 learns the words of a CNN of another width."""
    base = {"method": "words", "student": spec("plain_vit"), "epochs": 2, "warmup_epochs": 0, "words": 24}
    return options(**{**base, **changes})


def test_it_learns_from_labels_and_words(options: Options, tmp_path: Path) -> None:
    done = distill(words(options, epochs=3), tmp_path / "out")
    first, last = done.metrics[0], done.metrics[-1]
    assert {"ce", "bag", "train_top1", "test_top1"} <= set(last)
    assert last["bag"] < first["bag"]
    assert done.teacher is not None
    assert done.accuracy is not None
    assert done.accuracy.top1 == last["test_top1"]
    with pytest.raises(SpecError, match="--method words needs a teacher"):
        words(options, teacher=None).check()


def test_without_labels_a_plain_folder_will_do(options: Options, colours: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((colours / "train").rglob("*.png"))):
        Image.open(path).save(flat / f"{index:03}.png")
    done = distill(words(options, ce_weight=0.0, data=str(flat)), tmp_path / "out")
    assert done.accuracy is None
    assert "bag" in done.metrics[0]
    assert "ce" not in done.metrics[0]
    with_classes = distill(words(options, ce_weight=0.0), tmp_path / "classes")
    assert with_classes.accuracy is not None
    result = yaml.safe_load((tmp_path / "classes" / "run.yaml").read_text())["result"]
    assert result["knn"]["images"] == 36
    assert result["teacher_top1"] is None, "labels score by neighbours alone"


def test_the_teacher_s_weights_and_buffers_stay(options: Options, colours: Path) -> None:
    teacher = cp.Subject("teacher", networks_teacher(), cp.load_subject(spec("teacher")).preprocessing)
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    cp.distill(
        student=spec("plain_vit"), teacher=teacher, data=str(colours), method=cp.Words(words=24), epochs=1,
        batch_size=12, workers=0, device="cpu", validation=0,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())


def networks_teacher() -> torch.nn.Module:
    from tests.distill.networks import teacher

    return teacher()


def test_a_killed_run_ends_in_the_same_bits(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    config = words(options, student=spec("tiny_cnn"), checkpoint_minutes=0)
    distill(config, tmp_path / "whole")
    killed_after(8, monkeypatch, config, tmp_path / "killed")
    distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_auto_takes_the_level_that_cka_finds(options: Options, tmp_path: Path) -> None:
    config = words(options, levels="auto", teacher_layers="stages.0,stages.1", ce_weight=0.0, probe_examples=36)
    done = distill(config, tmp_path / "out")
    assert "bag" in done.metrics[0]
    record = read_record(tmp_path / "out")
    ((own, level),) = record.stages["pairs"]
    block = record.similarities["choice"]
    rows, cols = ([layer.name for layer in layers] for layers in (block.rows, block.cols))
    values = dict(zip(cols, block.values[rows.index(own)], strict=True))
    assert own == "blocks.5"
    assert level == "stages.0", "the one with a map of 5 x 5 or more"
    assert f"CKA with it: {values[level]:.3f}" in record.stages["stages"][-1]["reason"]
    assert "Words: <code>blocks.5</code> with <code>stages.0</code>" in report_page(record)


def test_auto_may_wait_for_labels_alone(options: Options, tmp_path: Path) -> None:
    done = distill(words(options, levels="auto", probe_epochs=1, probe_examples=36), tmp_path / "out")
    assert ["bag" in row for row in done.metrics] == [False, True]
    with pytest.raises(SpecError, match="--probe-epochs are of labels alone, but --ce-weight is 0"):
        words(options, levels="auto", probe_epochs=1, ce_weight=0.0).check()


def test_a_teacher_whose_maps_are_small_is_refused(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"'tiny_vit' has none at 16 × 16 px.*\(--teacher-layers\)"):
        distill(words(options, teacher=spec("tiny_vit"), ce_weight=0.0), tmp_path / "out")
