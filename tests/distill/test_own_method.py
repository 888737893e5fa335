"""A method of a stranger, in one file: its option gets a flag, its help, its checks, its record, and is resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.config import Training, as_record, from_record
from cka_probe.distill.methods import METHODS, Method, Needs
from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import report_page
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range
from tests.distill.conftest import spec
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]


@dataclass(frozen=True, kw_only=True)
class Matching(Method):
    """Cross-entropy, and the squared distance of scaled logits."""

    name = "matching"
    summary = "The squared distance of the logits, the student's scaled by a learned number."
    needs = Needs(logits=True)
    loss_options = ("strength",)

    strength: Annotated[float, Range(0, 10)] = 0.5
    """Of the distance between the logits."""

    layers_too: bool = False
    """Not there yet."""

    def check(self) -> None:
        super().check()
        if self.layers_too:
            raise SpecError("--layers-too is not there yet. Leave it out.")

    def build(self, setting: Setting) -> MethodLoss:
        return MethodLoss(self, setting, nn.Linear(1, 1))

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        distance = (seen.logits * loss.trained.weight - seen.teacher_logits).square().mean()
        return {**super().parts(loss, seen), "distance": self.strength * distance}

    @classmethod
    def report_title(cls) -> str:
        return "Matched by its logits"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Matching.name, Matching)


def run(*arguments: str) -> int:
    try:
        return main(["distill", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_its_option_has_a_flag_a_help_and_checks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("--method", "matching", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "--strength FLOAT",
        "Of the distance between the logits. (default: 0.5)",
        "squared distance of scaled",
    ):
        assert text in shown
    named = ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--method", "matching", "--strength", "11"], "--strength must be a number from 0 to 10, but is 11"),
        (["--method", "matching", "--layers-too"], "--layers-too is not there yet"),
        (["--method", "matching", "--gamma", "2"], "--gamma is an option of ofa and fbt, but the method is matching"),
        (["--strength", "1"], "--strength is an option of matching, but the method is ofa"),
    ):
        assert run(*named, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_its_run_is_recorded_reported_and_resumed(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(method="matching", strength=2.0, epochs=2)
    assert config.method == Matching(strength=2.0)
    assert from_record(as_record(config)) == config
    distill(config, tmp_path / "whole")
    recorded = yaml.safe_load((tmp_path / "whole" / "run.yaml").read_text())["options"]
    assert (recorded["method"], recorded["strength"], recorded["ce_weight"]) == ("matching", 2.0, 1.0)
    assert "gamma" not in recorded
    page = report_page(read_record(tmp_path / "whole"))
    assert "Matched by its logits" in page
    assert "<b>strength</b>" in page
    assert "<b>layers_too</b>" not in page

    killed_after(8, monkeypatch, config, tmp_path / "out")
    out = ["--resume", "--out", str(tmp_path / "out")]
    assert run(*out, "--strength", "3") == 2
    assert "strength was 2.0 and is 3.0" in capsys.readouterr().err
    assert run(*out, "--method", "kd") == 2
    assert "method was 'matching' and is 'kd'" in capsys.readouterr().err
    distill(config, tmp_path / "out", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_its_value_is_given_from_python(colours: Path) -> None:
    done = cp.distill(
        student=spec("tiny_vit"), teacher=spec("teacher"), data=str(colours), method=Matching(strength=1), epochs=1,
        batch_size=12, workers=0, device="cpu", validation=0,
    )  # fmt: skip
    assert "distance" in done.metrics[0]
