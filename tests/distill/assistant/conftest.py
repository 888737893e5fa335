"""Tiny networks as student and teacher of an assistant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cka_probe.activations.taps import Taps
from cka_probe.distill.assistant.loss import AssistantLoss
from cka_probe.distill.config import Training
from cka_probe.distill.methods.fbt import FBT
from cka_probe.distill.methods.loss import Setting, StepInputs
from cka_probe.distill.probe import setting_with
from cka_probe.distill.subjects import Examined, examine
from cka_probe.networks.models import Preprocessing, Subject
from tests.distill import networks

N = 6


def examined(name: str, network: nn.Module | None = None, size: int = 16, layers: str = "stages") -> Examined:
    """A network of tests/distill/networks.py, or another one, in evaluation mode."""
    network = (network or getattr(networks, name)()).eval()
    sees = Preprocessing((3, size, size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return examine(Subject(name, network, sees), layers, torch.device("cpu"))


Built = tuple[AssistantLoss, StepInputs, Examined, Examined]


@pytest.fixture
def build() -> Callable[..., Built]:
    """The loss of FBT for two networks, and a batch of noise as the student's and the teacher's pass saw it."""

    def make(student: str | Examined, teacher: str | Examined, **options: Any) -> Built:
        own, other = (examined(side) if isinstance(side, str) else side for side in (student, teacher))
        other.subject.network.requires_grad_(False)
        method = FBT(**options)
        config = Training(student="student", teacher="teacher", method=method, smoothing=0.0)
        decision = method.decide(own, other, config, None, 3)
        loss = method.build(setting_with(Setting(config, 3, 40, own.side, other.side), decision))
        assert isinstance(loss, AssistantLoss)
        return loss, seen_by(loss, own, other), own, other

    return make


def seen_by(loss: AssistantLoss, own: Examined, other: Examined) -> StepInputs:
    """A batch of noise."""
    images = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    logits, taken = Taps(own.subject.network, loss.student_layers).run(images)
    with torch.no_grad():
        teacher_logits, teacher_taken = Taps(other.subject.network, loss.teacher_layers).run(images)
    teacher_taken = loss.of_teacher(teacher_taken)
    return StepInputs(images, torch.arange(N) % 3, torch.arange(N), logits, taken, teacher_logits, teacher_taken)
