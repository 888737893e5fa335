"""The seam between loop and method: it carries a third network, and a method that needs no labels and no teacher.

The two methods are sketches of FBT (Fuse Before Transfer, arXiv 2410.12342) and OBoW (arXiv 2012.11552): what they ask
of the loop is as in the papers, what they compute is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS, Method
from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs, pooled, pooled_width
from cka_probe.distill.preparation import prepare
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.runtime.randomness import seed_everything
from cka_probe.runtime.world import World
from tests.distill.conftest import spec
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]


@dataclass(frozen=True, kw_only=True)
class Fused(Method):
    """A third network, fused from a stage of the student and modules of its own, learns beside the student."""

    name = "fused"

    def build(self, setting: Setting) -> MethodLoss:
        return FusedLoss(self, setting)


@dataclass(frozen=True, kw_only=True)
class Bags(Method):
    """Several crops of an image, each to say what a moving average of the student sees in the whole; no labels."""

    name = "bags"
    needs_teacher = False

    def build(self, setting: Setting) -> MethodLoss:
        return BagsLoss(self, setting)


class FusedLoss(MethodLoss):
    def __init__(self, method: Method, setting: Setting) -> None:
        super().__init__(method, setting)
        self.student_layers = setting.student.stages[1:2]
        width = pooled_width(self.student_layers[0])
        self.bridge = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, setting.classes))

    def forward(self, seen: StepInputs) -> dict[str, Tensor]:
        fused = self.bridge(pooled(seen.taken[0], self.student_layers[0]))
        taught, between = (F.log_softmax(logits, 1) for logits in (seen.teacher_logits, fused))
        return super().forward(seen) | {
            "teacher_to_fused": F.kl_div(between, taught, log_target=True, reduction="batchmean"),
            "fused_to_student": F.kl_div(
                F.log_softmax(seen.logits, 1), between.detach(), log_target=True, reduction="batchmean"
            ),
        }


class BagsLoss(MethodLoss):
    def __init__(self, method: Method, setting: Setting) -> None:
        super().__init__(method, setting)
        self._student = [setting.student.network]  # in a list: its parameters are the student's, not the method's
        self.teacher = deepcopy(setting.student.network).requires_grad_(False)
        self.register_buffer("words", torch.randn(6, setting.classes))
        self.words: Tensor
        self.rates: list[float] = []

    def forward(self, seen: StepInputs) -> dict[str, Tensor]:
        with torch.no_grad():
            bag = (-torch.cdist(self.teacher(seen.images), self.words)).softmax(1)
            self.words = torch.cat([self.words[1:], self.teacher(seen.images)[:1]])
        losses = []
        for _ in range(3):
            left, top = torch.randint(0, 8, (2,)).tolist()
            crop = F.interpolate(seen.images[..., top : top + 8, left : left + 8], seen.images.shape[-2:])
            losses.append(-(bag * (self._student[0](crop) @ self.words.T).log_softmax(1)).sum(1).mean())
        return {"bags": torch.stack(losses).mean()}

    @torch.no_grad()
    def after_update(self, student: nn.Module, done: float) -> None:
        rate = 1 - 0.1 * (1 + math.cos(math.pi * done)) / 2
        self.rates.append(rate)
        for own, other in zip(self.teacher.parameters(), student.parameters(), strict=True):
            own.lerp_(other, 1 - rate)


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "fused", Fused)
    monkeypatch.setitem(METHODS, "bags", Bags)


@pytest.mark.slow
@pytest.mark.usefixtures("sketches")
@pytest.mark.parametrize("method", ["fused", "bags"])
def test_other_kinds_of_method_train_and_resume_to_the_same_bits(
    method: Any, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(method=method, checkpoint_minutes=0)
    whole = distill(config, tmp_path / "whole")
    killed_after(9, monkeypatch, config, tmp_path / "killed")
    resumed = distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    for part in {"fused": ("teacher_to_fused", "fused_to_student"), "bags": ("bags",)}[method]:
        assert [row[part] for row in whole.metrics] == [row[part] for row in resumed.metrics]


@pytest.mark.slow
@pytest.mark.usefixtures("sketches")
def test_a_method_of_no_labels_has_no_cross_entropy_and_hears_of_every_update(options: Options) -> None:
    config = options(method="bags", epochs=2, accumulate=2)  # 72 images in batches of 12
    world = World(torch.device("cpu"))
    ready = prepare(config, world)
    step = TrainingStep(ready, config, world)
    step.equip(None)
    method: Any = step.learner.loss
    before = deepcopy(method.state_dict())
    for epoch in range(2):
        for number, batch in enumerate(ready.images.epoch(epoch)):
            parts = step(batch, update=number % 2 == 1)
            assert set(parts) == {"bags"}
    assert step.updates == len(method.rates) == 6
    assert method.rates[-1] == 1, "the end of the run"
    assert not torch.equal(before["words"], method.words)


def test_the_parts_of_a_step_are_those_of_its_loss_and_accumulation_averages_gradients(options: Options) -> None:
    """Two half batches accumulated move the weights as their whole does, up to round-off: no norm over the batch."""
    world, results = World(torch.device("cpu")), []
    for batch_size, accumulate in ((24, 1), (12, 2)):
        plain = {"student": spec("plain_vit"), "optimizer": "sgd", "lr": 0.1, "clip": None, "warmup_epochs": 0}
        config = options(method="kd", batch_size=batch_size, accumulate=accumulate, **plain)
        torch.manual_seed(3)
        ready = prepare(config, world)
        torch.manual_seed(4)
        for parameter in ready.student.subject.network.parameters():
            nn.init.normal_(parameter, std=0.1)
        step = TrainingStep(ready, config, world)
        step.equip(None)
        batches = ready.images.epoch(0)
        for number in range(accumulate):
            seed_everything(0)
            parts = step(next(batches), update=number == accumulate - 1)
            assert set(parts) == {"ce", "kd"}
        results.append({name: tensor.clone() for name, tensor in step.network.state_dict().items()})
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_a_step_leaves_no_hook_behind(options: Options) -> None:
    world = World(torch.device("cpu"))
    config = options(method="fitnet", stages="last")
    ready = prepare(config, world)
    step = TrainingStep(ready, config, world)
    step.equip(None)
    step.release()
    assert ready.teacher is not None
    for network in (ready.student.subject.network, ready.teacher.subject.network):
        assert not any(module._forward_hooks for module in network.modules())
