"""Networks with hooks, and the loss of every distillation method, on fake CUDA tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.features import as_features
from cka_probe.activations.hooks import capture
from cka_probe.activations.taps import Taps
from cka_probe.activations.trace import trace
from cka_probe.distill.bags.dynamic_head import DynamicHead
from cka_probe.distill.bags.prediction import BagPrediction
from cka_probe.distill.bags.vocabulary import Vocabulary
from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.loss import MethodLoss, Setting
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.distill.subjects import Examined, examine
from cka_probe.distill.training.learner import Learner
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject
from tests.distill.networks import SIZE, tiny_cnn, tiny_vit
from tests.fake_cuda.device import CUDA, fake_cuda

N = 8
SMALL = Preprocessing(size=(3, SIZE, SIZE))
NETWORKS = {"tiny_cnn": tiny_cnn, "tiny_vit": tiny_vit}


@pytest.fixture(scope="module")
def sides() -> dict[str, Examined]:
    return {
        name: examine(Subject(name, make(), SMALL), "stages", torch.device("cpu")) for name, make in NETWORKS.items()
    }


def build(name: str, sides: dict[str, Examined], networks: tuple[nn.Module, nn.Module]) -> MethodLoss:
    """A method as the loop builds it: on the CPU, and then moved."""
    student, teacher = (replace(sides[key].side, network=net) for key, net in zip(sides, networks, strict=True))
    kind = METHODS[name]
    chosen = (1, 3) if issubclass(kind, StageChoice) else ()
    matches = tuple(teacher.stages[stage - 1].name for stage in chosen) if name == "fitnet" else ()
    config = Training(student="student", teacher="teacher", method=name)
    with torch.device("cpu"):
        method = config.method.build(Setting(config, 3, 40, student, teacher, chosen, matches))
    return method.to(CUDA)


def losses(name: str, sides: dict[str, Examined], *, soft: bool) -> Counter[tuple[str, str]]:
    """What the host reads in two steps of a method."""
    with fake_cuda() as access:
        with CUDA:
            networks = tuple(NETWORKS[key]() for key in sides)
        method = build(name, sides, networks)  # type: ignore[arg-type]
        learner = Learner(networks[0], method, copies=False)
        taps = Taps(networks[1], method.teacher_layers)
        access.found.clear()
        with torch.device("cpu"):
            for _ in range(2):
                images = torch.empty(N, 3, SIZE, SIZE, device=CUDA)
                target = torch.empty(N, 3, device=CUDA) if soft else torch.zeros(N, dtype=torch.long, device=CUDA)
                with torch.no_grad():
                    logits, taken = taps.run(images)
                parts = learner(images, target, torch.arange(N, device=CUDA), logits, method.of_teacher(taken))
                assert all(part.is_cuda and part.shape == () for part in parts.values())
                method.after_update(networks[0], 0.5)
        return access.found


@pytest.mark.slow
@pytest.mark.parametrize("student", NETWORKS)
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not issubclass(kind, BagMethod)])
def test_a_step_of_a_method_waits_for_nothing(name: str, sides: dict[str, Examined], student: str) -> None:
    ordered = {student: sides[student], **sides}
    for soft in (False, True):  # labels, and those of mixup
        assert not losses(name, ordered, soft=soft)


def test_words_and_their_prediction_wait_for_nothing() -> None:
    with fake_cuda() as access, torch.device("cpu"):
        bags = BagPrediction([Vocabulary(2 * N, 4, sharpness=15, seed=0)], [DynamicHead(4, 6, kappa=8)])
        bags = bags.to(CUDA)
        access.found.clear()
        for _ in range(2):
            parts = bags([torch.empty(2 * N, 6, device=CUDA)], [torch.empty(N, 4, 6, 6, device=CUDA)])
            assert all(part.is_cuda and part.shape == () for part in parts)
        assert not access.found


@pytest.mark.slow
def test_a_method_that_waits_or_leaves_a_tensor_behind_is_found(sides: dict[str, Examined], monkeypatch: Any) -> None:
    class Waits(METHODS["none"]):  # type: ignore[name-defined,misc]
        def parts(self, loss: Any, seen: Any) -> dict[str, Tensor]:
            return {"ce": seen.logits.mean() * float(seen.logits.amax())}

    class Behind(METHODS["none"]):  # type: ignore[name-defined,misc]
        def build(self, setting: Setting) -> MethodLoss:
            loss: MethodLoss = super().build(setting)
            loss.weights = torch.ones(3)  # no buffer: it stays on the CPU
            return loss

        def parts(self, loss: Any, seen: Any) -> dict[str, Tensor]:
            return {"ce": (seen.logits * loss.weights).mean()}

    monkeypatch.setitem(METHODS, "none", Waits)
    assert losses("none", sides, soft=False) == {("test_training.py:parts", "value"): 2}
    monkeypatch.setitem(METHODS, "none", Behind)
    with pytest.raises(RuntimeError, match="same device|two different devices"):
        losses("none", sides, soft=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_and_pooling_stay_on_the_device(name: str) -> None:
    network = NETWORKS[name]().eval()
    layers = {layer.activation: layer for layer in trace(network, torch.randn(3, 3, SIZE, SIZE)).layers}
    with fake_cuda() as access, torch.no_grad():
        with CUDA:
            network = NETWORKS[name]().eval()
        access.found.clear()
        seen = []

        def receive(which: Any, tensor: Tensor) -> None:
            if which in layers:
                for pool in ("none", "mean", "cls"):
                    seen.append(as_features(tensor, layers[which].layout, pool))

        with capture(network, {which.module for which in layers}, receive):
            network(torch.empty(N, 3, SIZE, SIZE, device=CUDA))
        assert len(seen) == 3 * len(layers)
        assert all(features.is_cuda and len(features) == N for features in seen)
        assert not access.found
