"""--train head: the classifier alone learns, whatever the network is set to; its features are computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cka_probe.distill.config import Training
from cka_probe.distill.config_checks import check_training
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.preparation import prepare
from cka_probe.distill.training.head import classifier_of, is_random, with_head_alone
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from cka_probe.networks.models import Subject, load_subject
from cka_probe.runtime.world import World

Options = Callable[..., Training]
HERE = World(torch.device("cpu"))
PLAIN: dict[str, Any] = {
    "student": "zoo:cnn", "teacher": None, "method": "none", "train": "head", "crop_scale": (1.0, 1.0), "flip": 0.0,
    "warmup_epochs": 0, "lr": 0.02, "epochs": 2, "image_size": 32,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"flip": 0.5}])
def test_all_but_the_classifier_stays(options: Options, tmp_path: Path, changes: dict[str, Any]) -> None:
    done = distill(options(**PLAIN | changes), tmp_path / "run")
    before = load_subject("zoo:cnn").network.state_dict()
    assert done.student is not None
    after = done.student.state_dict()
    changed = {
        name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()
    }
    assert changed == {"fc.weight", "fc.bias"}, "running statistics too are what they were"
    spec = str(tmp_path / "run")
    assert done.accuracy.top1 == evaluate(spec, data=str(options().data), device="cpu", workers=0).top1


def test_features_are_those_of_a_pass_in_evaluation_mode(options: Options) -> None:
    config = options(**PLAIN)
    ready = with_head_alone(prepare(config, HERE), config, HERE)
    network, seen = ready.student.subject.network, ready.student.subject.preprocessing
    batch = next(ready.images.epoch(0))
    network.train()
    logits = network(torch.stack([seen.transform()(ready.parts.train.read(int(i))[0]) for i in batch.indices]))
    assert ready.trained is network.fc
    torch.testing.assert_close(network.fc(batch.images), logits)
    assert not network.layer1.training
    assert network.fc.training
    assert [name for name, weight in network.named_parameters() if weight.requires_grad] == ["fc.weight", "fc.bias"]


@pytest.mark.slow
def test_once_and_each_step_are_the_same_training(options: Options, tmp_path: Path) -> None:
    config = options(**PLAIN)
    once = distill(config, tmp_path / "once")
    each = distill(options(**PLAIN, image_cache=1e-6), tmp_path / "each")  # too little for features
    assert [row["loss"] for row in once.metrics] == pytest.approx([row["loss"] for row in each.metrics], rel=1e-4)
    assert once.accuracy.top1 == each.accuracy.top1


def test_which_augmentation_is_random() -> None:
    plain = Training(student="zoo:cnn", crop_scale=(1, 1), flip=0)
    assert not is_random(plain)
    assert is_random(Training(student="zoo:cnn"))
    assert is_random(Training(student="zoo:cnn", crop_scale=(1, 1), flip=0, mixup=0.1))


def test_the_classifier_is_timm_s_or_the_last_linear() -> None:
    assert classifier_of(load_subject("zoo:vit")) == ["head"]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))
    assert classifier_of(Subject("plain", plain)) == ["3"]
    with pytest.raises(SpecError, match="needs a classifier"):
        classifier_of(Subject("none", nn.Sequential(nn.Conv2d(3, 2, 1))))


def test_a_head_learns_from_labels_alone(options: Options) -> None:
    with pytest.raises(SpecError, match="use --method none"):
        check_training(options(train="head", method="kd"))
