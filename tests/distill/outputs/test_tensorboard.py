"""Event files: the values of metrics.csv, each step once, and a clear message where the package is missing."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from cka_probe.distill.config import Training
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from tests.distill.training.test_train import killed_after

Options = Callable[..., Training]


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every event of every file, none of them purged: tag -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((out / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(make_ndarray(value.tensor))))
    return found


def table(out: Path, column: str) -> list[tuple[int, float]]:
    with (out / "metrics.csv").open() as file:
        return [(int(row["epoch"]), float(row[column])) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
def test_the_events_are_the_metrics(options: Options, tmp_path: Path) -> None:
    distill(options(stages="auto", branches=1, rule="divergent", ema=0.5, tensorboard=True), tmp_path / "out")
    found = events(tmp_path / "out")
    (branch,) = [tag for tag in found if tag.startswith("loss/branch_")]
    tags = {
        "loss/total": "loss", "loss/ce": "ce", "loss/ofa": "ofa", branch: branch.removeprefix("loss/"),
        **{f"accuracy/{column}": column for column in ("train_top1", "test_top1", "test_top1_ema")},
        "training/lr": "lr", "training/updates": "updates", "training/images_per_second": "images_per_second",
    }  # fmt: skip
    assert found.keys() == tags.keys()
    for tag, column in tags.items():
        expected = table(tmp_path / "out", column)
        assert [step for step, _ in found[tag]] == [step for step, _ in expected]
        # Event files hold float32.
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [step for step, _ in found[branch]] == [2, 3], "it joined after the first epoch"


@pytest.mark.slow
def test_a_resumed_run_has_every_step_once(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = options(method="kd", tensorboard=True), tmp_path / "out"
    killed_after(14, monkeypatch, config, out)  # in the third epoch
    assert [step for step, _ in events(out)["loss/kd"]] == [1, 2]
    distill(config, out, resume=True)
    assert [step for step, _ in events(out)["loss/kd"]] == [1, 2, 3]
    distill(options(method="none", teacher=None, epochs=1), out, overwrite=True)
    assert not (out / "tensorboard").exists(), "of the run before"


def test_without_the_package_nothing_is_begun(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(SpecError, match=r"pip install 'cka-probe\[tensorboard\]'"):
        distill(options(tensorboard=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
