"""The loss of FBT: three arrows against formulas, weights, what learns from what, and its warning."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import cka_probe as cp
from cka_probe.distill.assistant.loss import LEAST_TEMPERATURE, TEMPERATURE
from cka_probe.distill.config import Training
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from tests.distill import paper_oracles as papers
from tests.distill.assistant.conftest import Built, seen_by
from tests.distill.conftest import spec

ARROWS = cp.FBT.arrows
Build = Callable[..., Built]
Options = Callable[..., Training]


def double(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


def test_the_parts_are_those_of_the_formulas(build: Build) -> None:
    """A CNN student of 16 channels and a ViT teacher of 16: no linear layer stands between them and the loss."""
    gammas = (1.0, 1.2, 1.5)
    loss, _, own, other = build("tiny_cnn", "tiny_vit", gamma=gammas, feature_weight=2.0, kd_weight=0.5)
    for side in (own, other):
        side.subject.network.eval()
    seen = seen_by(loss, own, other)
    with torch.no_grad():
        loss.log_temperatures.copy_(torch.tensor([0.05, 0.1, 0.3]).log())
    vit: Any = other.subject.network
    tokens = vit.blocks[5:](loss.assistant.l2g(seen.taken[0]))
    features = {
        "student": double(seen.taken[1]).mean((2, 3)),
        "assistant": double(tokens)[:, 1:].mean(1),  # without the class token
        "teacher": double(seen.teacher_taken[0]),
    }
    logits = {
        "student": double(seen.logits),
        "assistant": double(vit.forward_head(vit.norm(tokens))),
        "teacher": double(seen.teacher_logits),
    }
    parts, labels = loss(seen), seen.target.numpy()
    assert parts.pop("ce").item() == pytest.approx(float(torch.nn.functional.cross_entropy(seen.logits, seen.target)))
    for arrow, gamma, temperature in zip(ARROWS, gammas, (0.05, 0.1, 0.3), strict=True):
        chosen = [float(arrow == f"{source}_{target}") for source, target in papers.ARROWS]
        options = {"weights": chosen, "temperatures": [temperature] * 3, "gamma": gamma}
        source, target = arrow.split("_")
        between = papers.ofa(logits[target], logits[source], labels, gamma=gamma)
        contrast = papers.fbt(features, logits, labels, {}, **options) - between
        assert parts.pop(f"{arrow}_features").item() == pytest.approx(2.0 * contrast, rel=1e-4)
        assert parts.pop(f"{arrow}_logits").item() == pytest.approx(0.5 * between, rel=1e-5)
    assert not parts


def test_the_teachers_features_are_averaged_without_its_class_token(build: Build) -> None:
    _, seen, _, other = build("tiny_cnn", "tiny_vit")
    activations: list[torch.Tensor] = []
    last = other.side.stages[-1].activation.module
    handle = other.subject.network.get_submodule(last).register_forward_hook(lambda *args: activations.append(args[2]))
    with torch.no_grad():
        other.subject.network(seen.images)
    handle.remove()
    torch.testing.assert_close(seen.teacher_taken[0], activations[0][:, 1:].mean(1))


def gradients(build: Build, **options: float) -> dict[str, bool]:
    """Whether student, L2G and the temperatures get gradients from parts of the loss."""
    loss, _, own, other = build("tiny_cnn", "tiny_vit", **{"ce_weight": 0.0, **options})
    network = own.subject.network
    torch.stack(list(loss(seen_by(loss, own, other)).values())).sum().backward()

    def learns(module: torch.nn.Module) -> bool:
        return any(weight.grad is not None and bool(weight.grad.any()) for weight in module.parameters())

    temperatures = loss.log_temperatures.grad
    assert temperatures is not None, "data-parallel training must see every parameter"
    return {
        "early stages": learns(network.layer1),  # type: ignore[arg-type]
        "last stages": learns(network.layer4),  # type: ignore[arg-type]
        "l2g": learns(loss.trained["l2g"]),
        **{arrow: bool(temperatures[number]) for number, arrow in enumerate(ARROWS)},
    }


@pytest.mark.slow
def test_each_arrow_teaches_its_target_and_never_its_source(build: Build) -> None:
    off = {f"{arrow}_weight": 0.0 for arrow in ARROWS}
    whole = dict.fromkeys(ARROWS, False)
    assert gradients(build, **off | {"teacher_student_weight": 1.0}) == {
        "early stages": True, "last stages": True, "l2g": False, **whole, "teacher_student": True,
    }  # fmt: skip
    assert gradients(build, **off | {"teacher_assistant_weight": 1.0}) == {
        "early stages": True, "last stages": False, "l2g": True, **whole, "teacher_assistant": True,
    }  # fmt: skip
    assert gradients(build, **off | {"assistant_student_weight": 1.0}) == {
        "early stages": True, "last stages": True, "l2g": False, **whole, "assistant_student": True,
    }  # fmt: skip
    assert gradients(build, **off, assistant_ce=1.0)["l2g"]


def test_temperatures_start_at_007_and_end_to_fall_at_001(build: Build) -> None:
    loss, *_ = build("tiny_cnn", "tiny_vit")
    torch.testing.assert_close(loss.log_temperatures.exp(), torch.full((3,), TEMPERATURE))
    with torch.no_grad():
        loss.log_temperatures[0] = log(0.001)
    loss.after_update(torch.nn.Identity(), 0.5)
    torch.testing.assert_close(loss.log_temperatures.exp()[0], torch.tensor(LEAST_TEMPERATURE))


def test_a_network_of_another_width_gets_a_linear_layer(build: Build) -> None:
    loss, *_ = build("tiny_cnn", "whole_teacher")
    widths = {name: tuple(loss.trained[name].weight.shape) for name in ("student",)}
    assert widths == {"student": (8, 16)}
    assert isinstance(loss.trained["assistant"], torch.nn.Identity)
    loss, *_ = build("tiny_cnn", "whole_teacher", assistant="teacher-first")
    assert tuple(loss.trained["assistant"].weight.shape) == (8, 16)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cp.FBT(gamma=(1.0, 1.0)), "--gamma must be one number, or 3, but is"),
        (cp.FBT(gamma=0.5), "--gamma must be"),
        (cp.FBT(cut="4"), "--cut must be auto, 1 to 3"),
        (cp.FBT(assistant="first"), "--assistant must be"),  # type: ignore[arg-type]
        (cp.FBT(similarity="/"), "--similarity is for --cut auto, but --cut is '3'"),
        (cp.FBT(teacher_assistant_weight=-1), "--teacher-assistant-weight must be"),
    ],
)
def test_wrong_options_are_refused(method: cp.FBT, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        method.check()


def rows(*pairs: tuple[float, float | None]) -> list[dict[str, float | None]]:
    return [{"validation_top1": student, "validation_top1_assistant": assistant} for student, assistant in pairs]


def test_an_assistant_that_stays_below_the_student_is_warned_of() -> None:
    fbt = cp.FBT()
    assert not fbt.cautions([], 10)
    assert not fbt.cautions(rows((0.5, 0.1)), 10), "a fifth has not passed"
    assert fbt.cautions(rows((0.5, 0.1), (0.5, 0.1)), 10)
    assert fbt.cautions(rows((0.5, 0.9), (0.5, 0.1), (0.6, 0.1)), 10)
    assert not fbt.cautions(rows((0.5, 0.1), (0.5, 0.1), (0.5, 0.6)), 10), "it caught up"
    assert not fbt.cautions(rows((0.5, 0.6), (0.5, 0.6), (0.5, 0.1)), 10), "one epoch says little"
    assert not fbt.cautions(rows((0.5, None), (0.5, None)), 10), "the cut is not chosen yet"


@pytest.mark.full
def test_without_its_teacher_the_assistant_learns_nothing_and_a_warning_says_so(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole runs: the assistant of one is right on nearly all images, that of the other guesses."""
    whole = {"method": "fbt", "teacher": spec("whole_teacher"), "student": spec("tiny_cnn"), "epochs": 10}
    taught = distill(options(**whole), tmp_path / "taught").metrics
    with caplog.at_level("WARNING", "cka_probe"):
        alone = distill(options(**whole, teacher_assistant_weight=0.0), tmp_path / "alone").metrics
    assert taught[-1]["test_top1_assistant"] > 0.9
    assert alone[-1]["test_top1_assistant"] < 0.7, "it names two of three colours at best"
    assert "The assistant was less accurate than the student" in caplog.text
