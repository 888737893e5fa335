"""Methods get what they ask for and ask for nothing else, of networks that have only some of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.methods import METHODS
from cka_probe.distill.subjects import examine, leaves_parameters
from cka_probe.distill.training.train import distill
from cka_probe.errors import NetworkError, SpecError
from cka_probe.networks.models import load_subject
from tests.distill.conftest import spec

Options = Callable[..., Training]
CPU = torch.device("cpu")
LOGITS = ("kd", "dkd", "dist")
FEATURES = ("fitnet", "cc", "rkd", "crd", "rsd")


def odd(factory: str) -> str:
    """The model spec of a factory in odd_networks.py."""
    return f"{Path(__file__).with_name('odd_networks.py')}:{factory}"


@pytest.mark.slow
@pytest.mark.parametrize("method", [*LOGITS, "cc", "rkd", "crd", "rsd"])
def test_perceptrons_learn_from_perceptrons(method: str, options: Options, tmp_path: Path) -> None:
    config = options(method=method, student=odd("perceptron"), teacher=odd("teacher_of_vectors"), epochs=1)
    done = distill(config, tmp_path)
    assert (tmp_path / "similarity.after.npz").exists()
    assert done.teacher is not None
    assert done.teacher.top1 == 1


def test_a_perceptron_trains_alone(options: Options, tmp_path: Path) -> None:
    distill(options(method="none", teacher=None, student=odd("perceptron"), epochs=1), tmp_path)


def test_the_features_of_vectors_are_those_before_the_logits() -> None:
    examined = examine(load_subject(odd("perceptron")), "stages", CPU)
    assert [layer.name for layer in examined.side.stages] == ["1"]
    assert examined.side.width == 16
    assert examined.candidates == ()


@pytest.mark.slow
def test_ofa_takes_a_teacher_of_vectors(options: Options, tmp_path: Path) -> None:
    done = distill(options(teacher=odd("teacher_of_vectors"), stages="auto", epochs=2), tmp_path)
    assert any(name.startswith("branch_") for name in done.metrics[-1])


@pytest.mark.parametrize("teacher", ["bare", "scripted_teacher"])
def test_networks_without_layers_are_not_compared(
    teacher: str, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = options(method="kd", student=odd("bare"), teacher=odd(teacher), epochs=1, image_size=16)
    with caplog.at_level("INFO", "cka_probe"):
        distill(config, tmp_path)
    assert "Student and teacher are not compared: 'bare' has no layers that can be observed" in caplog.text
    assert not (tmp_path / "similarity.after.npz").exists()


@pytest.mark.slow
def test_what_needs_layers_refuses_networks_without(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--method rkd needs features of both networks, but 'bare' has no layers"):
        distill(options(method="rkd", teacher=odd("bare")), tmp_path)
    with pytest.raises(SpecError, match="--stages auto compares student and teacher, but 'bare' has no layers"):
        distill(options(method="ofa", teacher=odd("bare"), stages="auto"), tmp_path)
    distill(options(method="ofa", teacher=odd("bare"), stages="last", epochs=1), tmp_path)


def test_fitnet_matches_maps_and_tokens_alone(options: Options, tmp_path: Path) -> None:
    """The blocks of the teacher, with which ``auto`` compares, end in its linear layer."""
    config = options(
        student=odd("convolutions"),
        teacher=odd("convolutional_teacher"),
        method="fitnet",
        stages="auto",
        branch_budget=1,
    )
    distill(config, tmp_path)
    (own, first), (other, second) = yaml.safe_load((tmp_path / "stages.yaml").read_text())["pairs"]
    assert (own, other) == ("0", "2")
    assert {first, second} <= {"maps.0", "maps.2"}


def test_stages_without_a_map_are_refused_with_the_right_flag_and_candidates(options: Options, tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"no layer of 'perceptron' does.*need none: none, kd, cc, rkd, crd, rsd, dkd, dist"
    ):
        distill(options(student=odd("perceptron")), tmp_path)
    wrong = r"needs stages .* but '6' \(Linear, output of shape \(3,\)\) of 'convolutions' does not. Candidates: 0, 2."
    with pytest.raises(SpecError, match=wrong + " Use --student-layers 0,2."):
        distill(options(student=odd("convolutions"), student_layers="0,6"), tmp_path)
    with pytest.raises(SpecError, match=wrong + " Use --teacher-layers 0,2."):
        distill(options(teacher=odd("convolutions"), teacher_layers="6", method="fitnet"), tmp_path)


def test_the_stages_of_a_network_written_by_hand_are_its_maps() -> None:
    examined = examine(load_subject(odd("convolutions")), "stages", CPU)
    assert [layer.name for layer in examined.side.stages] == ["0", "2"]


@pytest.mark.parametrize("method", [*LOGITS, "ofa"])
def test_methods_of_logits_refuse_a_teacher_of_other_classes(method: str, options: Options, tmp_path: Path) -> None:
    cure = "Train its head first: cka-probe distill --method none --train head --student .*fitnet, cc, rkd, crd, rsd"
    with pytest.raises(SpecError, match=f"--method {method} needs a teacher with the 3 classes.* has 7. {cure}"):
        distill(options(method=method, teacher=spec("tiny_cnn") + ",num_classes=7"), tmp_path)
    with pytest.raises(NetworkError, match=r"'headless' must put out logits"):
        distill(options(method=method, teacher=odd("headless")), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize("teacher", [spec("tiny_cnn") + ",num_classes=7", odd("headless")], ids=["classes", "headless"])
def test_methods_of_features_take_any_teacher(
    method: str, teacher: str, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "cka_probe"):
        done = distill(options(method=method, teacher=teacher, epochs=1), tmp_path, report=method == "rkd")
    assert caplog.text.count("The teacher's accuracy is not measured") == 1
    assert done.teacher is None
    assert len(done.metrics) == 1


def test_every_method_needs_logits_or_layers_but_none() -> None:
    assert [name for name, method in METHODS.items() if method.needs.logits] == ["kd", "ofa", "fbt", "dkd", "dist"]
    assert [name for name, method in METHODS.items() if not (method.needs.logits or method.needs.layers)] == ["none"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tuple", "always", "list", "named", "mapping"])
def test_further_outputs_change_nothing(
    kind: str, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = options(method="kd", student=odd("auxiliary") + ",kind=none", epochs=1)
    plain = distill(config, tmp_path / "plain")
    with caplog.at_level("INFO", "cka_probe"):
        done = distill(options(method="kd", student=odd("auxiliary") + f",kind={kind}", epochs=1), tmp_path / "more")
    speed = "images_per_second"
    assert [{**row, speed: 0} for row in done.metrics] == [{**row, speed: 0} for row in plain.metrics]
    assert caplog.text.count("puts out more than its logits") == 1
    assert done.student is not None
    for (name, mine), other in zip(done.student.state_dict().items(), plain.student.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_a_network_whose_output_is_a_tuple_is_evaluated(colours: Path) -> None:
    specs = [odd("auxiliary") + f",kind={kind}" for kind in ("none", "always")]
    first, second = (evaluate(spec, data=str(colours), device="cpu", workers=0) for spec in specs)
    assert first == second


def test_the_first_output_must_be_the_logits(options: Options, tmp_path: Path) -> None:
    config = options(method="none", teacher=None, student=odd("auxiliary") + ",kind=swapped")
    with pytest.raises(
        NetworkError, match=r"logits \(12, 3\) for 12 images first.* tuple of shapes \(12, 2\), \(12, 3\)"
    ):
        distill(config, tmp_path)


def test_parameters_without_a_part_in_the_logits_are_known() -> None:
    assert leaves_parameters(examine(load_subject(odd("auxiliary") + ",kind=tuple"), "stages", CPU), CPU)
    assert not leaves_parameters(examine(load_subject(spec("tiny_cnn")), "stages", CPU), CPU)


def test_a_frozen_student_is_refused_with_the_cause(options: Options, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"'frozen' cannot be trained: all of its parameters are frozen"):
        distill(options(method="none", teacher=None, student=odd("frozen")), tmp_path)
