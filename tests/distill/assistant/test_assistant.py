"""The assistant shares the modules of student and teacher, and changes nothing of the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cka_probe.errors import NetworkError
from tests.distill.assistant.conftest import Built, examined, seen_by

Build = Callable[..., Built]

DIRECTIONS = [("tiny_cnn", "tiny_vit"), ("tiny_vit", "tiny_cnn")]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
def test_its_parameters_are_those_of_the_two_networks_but_for_l2g(build: Build, student: str, teacher: str) -> None:
    loss, _, own, other = build(student, teacher)
    of_both = {id(weight) for side in (own, other) for weight in side.subject.network.parameters()}
    assistant = loss.assistant
    for segment in (assistant.head, assistant.tail):
        assert {id(weight) for weight in segment.parameters()} <= of_both
    new = {id(weight) for weight in assistant.parameters()} - of_both
    assert new == {id(weight) for weight in assistant.l2g.parameters()}
    assert not {id(weight) for weight in loss.parameters()} & of_both
    assert new < {id(weight) for weight in loss.parameters()}


def test_a_student_first_runs_the_teachers_last_blocks_on_l2g(build: Build) -> None:
    loss, seen, own, other = build("tiny_cnn", "tiny_vit")
    vit: Any = other.subject.network
    vit.eval()
    assert [layer.name for layer in own.side.stages] == ["layer1", "layer2", "layer4"]  # layer3's map is 1 x 1 too
    layer2 = seen.taken[0]
    tokens = vit.blocks[5:](loss.assistant.l2g(layer2))
    logits, last = loss.assistant.from_stage(layer2)
    assert torch.equal(last, tokens)
    assert torch.equal(logits, vit.forward_head(vit.norm(tokens)))


def test_a_teacher_first_runs_the_students_last_stage_on_l2g(build: Build) -> None:
    loss, seen, own, _ = build("tiny_cnn", "tiny_vit", assistant="teacher-first")
    cnn: Any = own.subject.network
    cnn.eval()
    blocks = seen.teacher_taken[0]
    maps = cnn.layer4(cnn.layer3(loss.assistant.l2g(blocks)))
    logits, last = loss.assistant.from_stage(blocks)
    assert torch.equal(last, maps)
    assert torch.equal(logits, cnn.forward_head(maps))


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
def test_training_leaves_the_teacher_and_the_students_statistics_alone(
    build: Build, student: str, teacher: str
) -> None:
    loss, _, own, other = build(student, teacher)
    network = own.subject.network.train()
    loss.assistant.train()
    assert not any(module.training for module in other.subject.network.modules())
    teachers = state(other.subject.network)
    seen = seen_by(loss, own, other)
    after_pass = {name: tensor.clone() for name, tensor in network.named_buffers()}
    optimizer = torch.optim.SGD(chain(network.parameters(), loss.parameters()), lr=0.1)
    torch.stack(list(loss(seen).values())).sum().backward()
    optimizer.step()
    assert equal(teachers, state(other.subject.network))
    assert equal(after_pass, dict(network.named_buffers()))
    assert all(weight.grad is None for weight in other.subject.network.parameters())


def test_a_students_tail_keeps_the_assistants_statistics_apart(build: Build) -> None:
    loss, seen, own, _ = build("tiny_cnn", "tiny_vit", assistant="teacher-first")
    statistics, network = loss.assistant.statistics, own.subject.network
    names = {name.rpartition(".")[2] for name, _ in statistics.named_buffers()}
    assert names == {"running_mean", "running_var", "num_batches_tracked"}
    before = state(statistics)
    network.train()
    loss.assistant.from_stage(seen.teacher_taken[0])
    assert not equal(before, state(statistics))
    # In evaluation mode the assistant uses its own: other values of the student's change nothing.
    network.eval()
    with torch.no_grad():
        first = loss.assistant.from_stage(seen.teacher_taken[0])[0]
        network.layer4[0].bn1.running_mean.add_(1)  # type: ignore[index,union-attr,operator]
        assert torch.equal(first, loss.assistant.from_stage(seen.teacher_taken[0])[0])
        before = state(statistics)
        loss.assistant(seen.images)
    assert equal(before, state(statistics))


@pytest.mark.parametrize(("student", "teacher"), DIRECTIONS)
def test_on_images_it_does_what_it_does_on_the_stage(build: Build, student: str, teacher: str) -> None:
    loss, seen, own, other = build(student, teacher)
    before = seen.taken[0] if student == "tiny_cnn" else seen.teacher_taken[0]
    for side in (own, other):
        side.subject.network.eval()
    assert torch.equal(loss.assistant(seen.images), loss.assistant.from_stage(before)[0])


@pytest.mark.parametrize(("first", "statistics"), [("student-first", False), ("teacher-first", True)])
def test_checkpoints_hold_what_is_new_alone(build: Build, first: str, statistics: bool) -> None:
    loss, *_ = build("tiny_cnn", "tiny_vit", assistant=first)
    held = {name.split(".")[1] if name.startswith("trained") else name for name in loss.state_dict()}
    assert held == {"log_temperatures", "l2g"} | ({"statistics"} if statistics else set())


def test_hooks_are_gone_after_release(build: Build) -> None:
    loss, _, _, other = build("tiny_cnn", "tiny_vit")
    hooks = [len(module._forward_hooks) for module in other.subject.network.modules()]
    loss.release()
    assert sum(len(module._forward_hooks) for module in other.subject.network.modules()) == sum(hooks) - 1


def test_a_network_whose_logits_need_the_images_is_refused(build: Build) -> None:
    with pytest.raises(NetworkError, match="'teacher' cannot be part of an assistant|The assistant"):
        build("tiny_vit", "teacher", assistant="student-first")


class Pairs(nn.Module):
    """Its third stage puts out two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(2)), Twice(), Sum())
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(x).mean((2, 3)))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu(), -x


class Sum(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0] + x[1]


def test_a_stage_of_several_tensors_can_come_first_but_not_second(build: Build) -> None:
    pairs = examined("pairs", Pairs(), layers="stages.0,stages.1,stages.2:0,stages.3")
    loss, seen, *_ = build("tiny_cnn", pairs, assistant="teacher-first", cut="2,3")
    loss(seen)
    with pytest.raises(NetworkError, match="The assistant needs a stage that puts out one tensor, but 'stages.2"):
        build("tiny_cnn", pairs, assistant="student-first", cut="2,3")
