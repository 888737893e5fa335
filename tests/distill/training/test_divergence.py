"""A training that is not finite any more stops before it is saved, names the likely cause, and can be gone on with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cka_probe.cli.main import main
from cka_probe.distill import losses
from cka_probe.distill.config import Training
from cka_probe.distill.methods.fitnet import FitNet
from cka_probe.distill.training.divergence import advice, broken_weights
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import CheckpointError, SpecError, TrainingError
from cka_probe.runtime.world import World
from tests.distill.conftest import spec
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]
LOWER_LR = "Lower --lr, lower --clip, or lengthen --warmup-epochs."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "ofa", "gamma": (500.0,)},
            r"cause is in 'ofa' and .*: it depends on --gamma \(500.0, by default 1",
        ),
        (
            {"method": "fitnet", "feature_weight": 1e300},
            r"'hint_1' and .* --feature-weight \(1e\+300, by default 1.0\)",
        ),
        ({"method": "rkd", "feature_weight": 1e300}, r"--feature-weight \(1e\+300, by default 25.0\)"),
        ({"method": "kd", "temperature": 1e-300}, r"'kd': it depends on --temperature \(1e-300, by default 1.0\)"),
        ({"method": "none", "teacher": None, "ce_weight": 1e300}, r"'ce': it depends on --ce-weight \(1e\+300"),
        (
            {"method": "none", "teacher": None, "lr": 1e36, "optimizer": "sgd", "warmup_epochs": 0, "clip": None},
            "Lower --lr, set --clip, or lengthen --warmup-epochs",
        ),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else "",
)
def test_the_advice_fits_the_cause(options: Options, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        distill(options(epochs=1, **changes), tmp_path / "out")


def test_a_part_that_dominates_before_the_weights_break_is_the_cause() -> None:
    config = Training(student="s", method=FitNet(feature_weight=1e9), clip=1.0)
    assert "--feature-weight (1000000000.0, by default 1.0)" in advice(
        config, ("ce", "hint_1"), {"ce": 2.3, "hint_1": 1e9}
    )
    assert advice(config, ("ce", "hint_1"), {"ce": 2.3, "hint_1": 1.0}) == LOWER_LR
    assert advice(config, (), {"ce": 2.3, "hint_1": 1.0}) == LOWER_LR
    assert "check the weights of the student" in advice(
        config, ("ce", "hint_1"), dict.fromkeys(("ce", "hint_1"), math.nan)
    )


def test_weights_that_no_loss_can_be_finite_with_are_found() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    alone = World(torch.device("cpu"))
    assert broken_weights(network, alone) == []
    network[0].weight.data[0, 0] = 1e30
    network[1].bias.data[1] = torch.nan
    assert broken_weights(network, alone) == ["0.weight", "1.bias"]


def breaking_at(update: int, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """The weights are something else after so many updates, whose losses were all finite."""
    whole = TrainingStep._update

    def broken(self: TrainingStep) -> None:
        whole(self)
        if self.updates == update:
            next(self.network.parameters()).data.fill_(value)

    monkeypatch.setattr(TrainingStep, "_update", broken)


def loss_breaks_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sound, done = losses.kd_loss, 0

    def counting(*args: Tensor, **given: float) -> Tensor:
        nonlocal done
        done += 1
        return sound(*args, **given) * (torch.nan if done > steps else 1)

    monkeypatch.setattr(losses, "kd_loss", counting)


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_weights_that_break_in_the_last_update_of_an_epoch_are_not_saved(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    config, out = options(method="kd"), tmp_path / "out"
    with monkeypatch.context() as patched:
        breaking_at(12, patched, value)
        with pytest.raises(
            TrainingError, match=r"before a checkpoint is kept.*in epoch 2 by update 12. The last checkp"
        ):
            distill(config, out)
    distill(config, tmp_path / "whole")
    distill(config, out, resume=True)
    assert_same(tmp_path / "whole", out)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_bad_one_to_the_same_bits(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = options(method="kd"), tmp_path / "out"
    distill(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        breaking_at(12, patched, 1.0)  # a checkpoint of weights that are finite, and others than they should be
        loss_breaks_after(12, patched)
        with pytest.raises(TrainingError, match="epoch 3 .* is of update 12. If .* --resume-from previous goes on"):
            distill(config, out)
    (out / "notes.txt").write_text("mine")
    killed_after(8, monkeypatch, config, out, resume=True, resume_from="previous")
    kept = {path.name for path in (out / ".cka-probe").iterdir()}
    assert {"last.ckpt", "previous.ckpt"} <= kept
    distill(config, out, resume=True, resume_from="previous")  # the good one was not replaced by the bad one
    assert_same(tmp_path / "whole", out)
    assert (out / "notes.txt").read_text() == "mine"


def test_resume_from_previous_needs_one(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = options(method="kd"), tmp_path / "out"
    with pytest.raises(SpecError, match="--resume-from is for --resume"):
        distill(config, out, resume_from="previous")
    with pytest.raises(SpecError, match="--resume-from must be one of last, previous"):
        distill(config, out, resume=True, resume_from="first")  # type: ignore[arg-type]
    killed_after(2, monkeypatch, config, out)
    with pytest.raises(CheckpointError, match="holds no checkpoint before the last one. Resume from the last."):
        distill(config, out, resume=True, resume_from="previous")


@pytest.mark.slow
def test_resume_from_previous_is_a_flag(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = options(method="none", teacher=None, epochs=2)
    killed_after(8, monkeypatch, config, out)
    assert main(["distill", "--resume", "--resume-from", "previous", "--out", str(out)]) == 0
    distill(config, tmp_path / "whole")
    assert_same(tmp_path / "whole", out)


def test_batch_norm_over_one_value_is_refused_with_the_reason(options: Options, tmp_path: Path) -> None:
    for changes in (
        {"student": spec("tiny_cnn"), "method": "none", "teacher": None},
        {"student": spec("tiny_cnn"), "method": "ofa", "stages": "last"},
    ):
        with pytest.raises(SpecError, match="Batch norm needs at least 2 values a channel .* --batch-size 2 or more"):
            distill(options(epochs=1, batch_size=1, **changes), tmp_path / str(changes["method"]))


@pytest.mark.parametrize(("method", "least"), [("dist", 2), ("cc", 2), ("rkd", 3)])
@pytest.mark.usefixtures("_nothing_loads")
def test_relations_of_too_few_images_are_refused(options: Options, tmp_path: Path, method: str, least: int) -> None:
    with pytest.raises(SpecError, match=f"--method {method} relates the images of a batch, which must hold {least} at"):
        distill(options(method=method, batch_size=least - 1), tmp_path / "out")


@pytest.mark.usefixtures("_nothing_loads")
def test_rsd_of_one_image_a_process_is_refused(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="batch of a process, which must hold 2 images at least.*Use --batch-size 2"):
        distill(options(method="rsd", batch_size=1), tmp_path / "out")


@pytest.fixture
def _nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded before the options were checked")

    monkeypatch.setattr("cka_probe.distill.preparation.load", loaded)
    monkeypatch.setattr("cka_probe.distill.preparation.open_parts", loaded)
