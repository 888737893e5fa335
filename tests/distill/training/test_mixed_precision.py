"""--fp16: refused off CUDA; a scaler that skips steps whose gradients overflow, resumes exactly, and says when to stop.

Float16 runs on a CPU too, slowly; here the refusal of a CPU is lifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cka_probe.distill.config import Training, as_record, from_record
from cka_probe.distill.config_checks import check_training
from cka_probe.distill.evaluation.accuracy import accuracy_of, evaluate
from cka_probe.distill.options import Evaluation
from cka_probe.distill.preparation import prepare
from cka_probe.distill.training import step as step_file
from cka_probe.distill.training import train
from cka_probe.distill.training.divergence import advice
from cka_probe.distill.training.head import with_head_alone
from cka_probe.distill.training.run import loop
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError, TrainingError
from cka_probe.images.parts import open_parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject
from cka_probe.runtime.randomness import seed_everything
from cka_probe.runtime.world import World
from tests.distill.conftest import spec
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]
CPU = World(torch.device("cpu"))
BY_LABELS: dict[str, Any] = {"student": spec("plain_vit"), "method": "none", "teacher": None, "warmup_epochs": 0}


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float16 is not refused, and overflows are looked for after every update."""
    monkeypatch.setattr(train, "check_device", lambda *_: None)
    monkeypatch.setattr(loop, "CHECK_EVERY", 1)


def test_fp16_is_refused_with_bf16_and_without_cuda(options: Options, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(SpecError, match="--bf16 and --fp16 exclude each other. Choose one"):
        check_training(options(fp16=True, bf16=True))
    with pytest.raises(SpecError, match="--bf16 and --fp16 exclude each other"):
        evaluate(spec("teacher"), device="cpu", fp16=True, bf16=True)
    monkeypatch.setattr(train, "prepare", None)  # nothing is loaded
    with pytest.raises(SpecError, match="--fp16 needs a CUDA device, but the device is cpu. Use --bf16"):
        distill(options(fp16=True), tmp_path / "out")
    with pytest.raises(SpecError, match="--fp16 needs a CUDA device"):
        evaluate(spec("no_such_factory"), device="cpu", fp16=True)


def test_a_record_of_before_has_no_fp16(options: Options) -> None:
    record = as_record(options(bf16=True))
    del record["fp16"]
    assert from_record(record) == options(bf16=True)


@pytest.mark.parametrize(
    ("chosen", "kind"), [({"fp16": True}, torch.float16), ({"bf16": True}, torch.bfloat16), ({}, torch.float32)]
)
def test_training_and_evaluation_run_in_the_same_type(
    options: Options, colours: Path, chosen: dict[str, Any], kind: torch.dtype
) -> None:
    seen = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.dtype)

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    network[1].register_forward_hook(note)
    subject = Subject("net", network, Preprocessing(size=(3, 16, 16)))
    accuracy_of(subject, open_parts(str(colours)).test, CPU, Evaluation(workers=0, **chosen))
    assert set(seen) == {kind}
    config = options(**BY_LABELS, **chosen)
    step, batches = started(config)
    seen.clear()
    step.network.head.register_forward_hook(note)  # type: ignore[union-attr]
    step(next(batches), update=True)
    assert seen == [kind]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["fp16", "bf16"])
def test_a_head_alone_is_measured_in_the_type_of_its_features(options: Options, chosen: str) -> None:
    plain = {"crop_scale": (1.0, 1.0), "flip": 0.0, "train": "head", "image_size": 32, chosen: True}
    config = options(**BY_LABELS | plain | {"student": "zoo:cnn"})
    ready = with_head_alone(prepare(config, CPU), config, CPU)
    assert ready.accuracy is not None
    subject, test = ready.student.subject, ready.parts.test
    whole = accuracy_of(subject, test, CPU, Evaluation(workers=0, fp16=chosen == "fp16", bf16=chosen == "bf16"))
    assert ready.accuracy(subject.network, test) == whole


def started(config: Training) -> tuple[TrainingStep, Iterator[Any]]:
    ready = prepare(config, CPU)
    seed_everything(0)
    step = TrainingStep(ready, config, CPU)
    step.equip(None)
    step.learner.train()
    return step, ready.images.epoch(0)


def test_scaled_gradients_are_those_of_autocast_alone(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a power of two for the scale, and no value that leaves the range of float16, scaling is exact."""
    steps, whole = [], torch.amp.GradScaler
    for scales in (True, False):
        if not scales:
            monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: whole(device, enabled=False))
        config = options(**BY_LABELS, fp16=True, accumulate=2, clip=0.1, optimizer="sgd", lr=0.1)
        step, batches = started(config)
        if scales:
            step._scaler.load_state_dict({**step._scaler.state_dict(), "scale": 1024.0})
        for number in range(4):
            step(next(batches), update=number % 2 == 1)
        steps.append(step)
    for one, other in zip(*(step.network.parameters() for step in steps), strict=True):
        # Tiny gradients that vanish in float16 without a scale, against a rate of 0.1.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_skipped_counts_and_changes_no_weight(options: Options) -> None:
    step, batches = started(options(**BY_LABELS, fp16=True, ema=0.9, clip=1.0))
    step(next(batches), update=True)
    rate = step.optimizer.param_groups[0]["lr"]
    before, moments = deepcopy(step.network.state_dict()), deepcopy(step.optimizer.state_dict()["state"])
    step._scaler.load_state_dict({**step._scaler.state_dict(), "scale": 1e30})
    parts = step(next(batches), update=True)
    assert all(part.isfinite() for part in parts.values()), "no divergence: the loss itself is finite"
    for name, weight in step.network.state_dict().items():
        assert torch.equal(weight, before[name]), name
    for number, moment in step.optimizer.state_dict()["state"].items():
        assert moment["step"] == moments[number]["step"] == 1
    assert step.updates == 2
    assert step.optimizer.param_groups[0]["lr"] < rate, "the schedule goes on"
    assert step._scaler.get_scale() == pytest.approx(5e29)
    assert not step.overflows
    assert all(parameter.grad is None for parameter in step.network.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_cpu")
def test_a_run_with_skipped_steps_trains_and_resumes_to_the_same_bits(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: whole(device, 2.0**24, growth_interval=4, enabled=enabled)
    )
    config = options(**BY_LABELS | {"student": spec("tiny_vit")}, fp16=True, epochs=2, accumulate=2, ema=0.9)
    distill(config, tmp_path / "whole")
    killed_after(8, monkeypatch, config, tmp_path / "killed")
    saved = torch.load(tmp_path / "killed" / ".cka-probe" / "last.ckpt", weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**24, "steps were skipped"
    assert saved["updates"] == 3
    distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.usefixtures("on_a_cpu")
def test_gradients_that_overflow_at_any_scale_stop_the_run(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_file, "LEAST_SCALE", 2.0**13)  # four skipped steps on from 2 ** 16
    backward: Any = Tensor.backward

    def broken(self: Tensor) -> None:
        backward(self * torch.nan)

    monkeypatch.setattr(Tensor, "backward", broken)
    with pytest.raises(TrainingError, match=r"not at any scale of the loss, in epoch 1 by update 4.*without --fp16"):
        distill(options(**BY_LABELS, fp16=True), tmp_path / "out")


def test_the_advice_names_the_range_of_float16() -> None:
    assert "65504" in advice(Training(student="s", fp16=True), (), {"ce": 1.0})
    assert "65504" not in advice(Training(student="s"), (), {"ce": 1.0})
