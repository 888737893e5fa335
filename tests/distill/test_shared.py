"""Student and teacher share images, random numbers and modes, and neither sees what the other does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cka_probe.distill.config import Training
from cka_probe.distill.preparation import prepare
from cka_probe.distill.probe import measure
from cka_probe.distill.subjects import class_count, examine
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import NetworkError
from cka_probe.networks.models import load_subject
from cka_probe.runtime.world import World
from tests.distill.conftest import spec

Options = Callable[..., Training]
CPU = World(torch.device("cpu"))


def trained(config: Training, out: Path) -> dict[str, torch.Tensor]:
    distill(config, out)
    return safetensors.torch.load_file(out / "student.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["changes_its_input", "draws", "changes_modes"])
def test_a_teacher_is_not_seen_by_its_student_but_by_its_logits(how: str, options: Options, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"method": "kd", "epochs": 1, "warmup_epochs": 0, "student": spec("tiny_vit")}
    good = trained(options(teacher=spec("good_teacher"), **asked), tmp_path / "good")
    other = trained(options(teacher=spec(f"teacher_that_{how}"), **asked), tmp_path / "other")
    assert_same(good, other)


@pytest.mark.slow
def test_a_student_that_changes_its_input_trains_as_one_that_does_not(options: Options, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"method": "kd", "epochs": 1, "warmup_epochs": 0, "teacher": spec("good_teacher")}
    students = [
        trained(options(student=f"s={spec(f'student_{how}_place')}", **asked), tmp_path / how)
        for how in ("in", "out_of")
    ]
    assert_same(*students)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("student_that_exits", "'s' must run on every batch, but in epoch 2, step 2 of 6 it raised SystemExit: 7"),
        ("student_of_half_the_rows", r"'s' must put out logits .* but in epoch 1, step 1 of 6 put out shape \(6, 3\)"),
        ("student_without_gradients", "The logits of 's' have no gradients"),
    ],
)
def test_what_a_student_does_wrong_names_it_and_the_step(
    student: str, said: str, options: Options, tmp_path: Path
) -> None:
    config = options(student=f"s={spec(student)}", method="kd", epochs=2, warmup_epochs=0)
    with pytest.raises(NetworkError, match=said):
        distill(config, tmp_path / "out")


def test_a_network_that_raises_in_its_dry_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from tests.distill.networks import *\n"
        "def net():\n    network = plain_vit()\n    network.forward = lambda x: exit(3)\n    return network\n"
    )
    with pytest.raises(NetworkError, match=r"'net' .*images of shape \(3, 16, 16\), but raised SystemExit: 3"):
        class_count(load_subject(f"{tmp_path}/net.py:net"))
    with pytest.raises(NetworkError, match=r"'net' .*images of shape \(3, 16, 16\), but raised SystemExit: 3"):
        examine(load_subject(f"{tmp_path}/net.py:net"), "stages", torch.device("cpu"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled from now on, by a backend that takes no time."""
    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: original(network, backend=backend))
    torch._dynamo.reset()
    return seen


@pytest.mark.slow
def test_a_compiled_student_is_probed_as_it_is_and_trains_compiled_before_and_after(
    graphs: list[Any], options: Options
) -> None:
    plain, config = options(student=spec("plain_vit")), options(student=spec("plain_vit"), compile=True)
    ready = prepare(config, CPU)
    step = TrainingStep(ready, config, CPU)
    step.equip(None)
    step.learner.train()
    batches = ready.images.epoch(0)
    step(next(batches), update=True)
    compiled = len(graphs)
    assert compiled > 0
    assert ready.teacher is not None
    step.release()
    found = measure(ready.student, ready.teacher, ready.parts.probed, config, CPU.device)
    assert len(graphs) == compiled, "the measurement compiles nothing"
    other = prepare(plain, CPU)
    other.student.subject.network.load_state_dict(ready.student.subject.network.state_dict())
    assert other.teacher is not None
    expected = measure(other.student, other.teacher, other.parts.probed, plain, CPU.device)
    assert (found.values == expected.values).all()
    assert ready.student.subject.network._compiled_call_impl is not None
    step(next(batches), update=True)
