"""A whole training on fake CUDA tensors: what its steps read of the device, and what it reads when an epoch ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cka_probe.distill.config import Training, from_record
from cka_probe.distill.evaluation import accuracy
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.loss import Setting
from cka_probe.distill.methods.visual_words.bag_method import BagMethod
from cka_probe.distill.preparation import Prepared
from cka_probe.distill.subjects import Examined, examine
from cka_probe.distill.training import resuming, train
from cka_probe.distill.training.pipeline import Batch, Views
from cka_probe.distill.training.scores import Scores
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.sums import LossSums
from cka_probe.images.parts import Parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject
from cka_probe.runtime import world
from tests.distill.networks import SIZE, tiny_cnn, tiny_vit
from tests.fake_cuda.device import CUDA, HostAccess, fake_cuda

N, STEPS = 8, 2
SMALL = Preprocessing(size=(3, SIZE, SIZE))
NETWORKS = {"tiny_vit": tiny_vit, "tiny_cnn": tiny_cnn}
Found = Counter[tuple[str, str]]

TIMED = {("progress.py:_now", "stream"): 2}
"""Once a run, some steps are timed for an estimate of the rest."""

START = {"pipeline.py", "probe.py", "recordings.py", "run.py", "segments.py"}
"""The files that read of the device before the first step."""

END = {"accuracy.py", "divergence.py", "epoch_end.py", "finish.py", "forward.py", "run.py", "sums.py"}
"""Those that do when an epoch ends."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sides() -> dict[str, Examined]:
    """Student and teacher, from dry runs on the CPU."""
    cpu = torch.device("cpu")
    return {name: examine(Subject(name, make(), SMALL), "stages", cpu) for name, make in NETWORKS.items()}


@dataclass
class Run:
    """The batches of a training, and what the host reads in each step and between epochs."""

    access: HostAccess
    in_steps: Found = field(default_factory=Counter)
    between: list[Found] = field(default_factory=list)
    steps: int = STEPS

    def epoch(self, epoch: int, *, first: int = 0, pin: bool = False) -> Iterator[Batch]:
        assert pin
        self.between.append(self._taken())
        for step in range(STEPS):
            indices = torch.arange(step * N, (step + 1) * N)
            yield Batch(torch.empty(N, 3, SIZE, SIZE, dtype=torch.uint8), torch.empty_like(indices), indices)
            self.in_steps += self._taken()

    def _taken(self) -> Found:
        found = Counter(self.access.found)
        self.access.found.clear()
        return found


def run(
    sides: dict[str, Examined], out: Path, monkeypatch: pytest.MonkeyPatch, method: str = "ofa", **options: Any
) -> Run:
    """Train for two epochs. Neither images nor files are read, and no gradients computed: they are only there."""
    base = {"student": "zoo:vit", "teacher": None if method == "none" else "zoo:cnn", "method": method}
    small = {"epochs": 2, "batch_size": N, "warmup_epochs": 0, "workers": 0, "device": "cuda"}
    config = from_record({**base, **small, **options})
    with fake_cuda(0) as access, monkeypatch.context() as patch:
        done = Run(access)
        ready = prepared(sides, config, done)
        patch.setattr(world, "device_named", lambda _: CUDA)
        patch.setattr(train, "prepare", lambda *_: ready)
        patch.setattr(resuming, "fingerprint", lambda _: "")
        patch.setattr(resuming, "weights_fingerprint", lambda _: "")
        patch.setattr(Scores, "guard_teacher", lambda _: None)
        patch.setattr(accuracy, "DataLoader", lambda *_, **__: [(torch.empty(N, 3, SIZE, SIZE), torch.arange(N))])
        patch.setattr(torch, "save", lambda _, file: file.write(b"state"))
        patch.setattr(safetensors.torch, "save", lambda _: b"weights")
        patch.setattr(Tensor, "backward", give_gradients)
        train.distill(config, out)
    done.between.append(Counter(access.found))
    return done


def prepared(sides: dict[str, Examined], config: Training, batches: Run) -> Prepared:
    """What a training is made from, on the fake device."""
    with CUDA:
        student, teacher = (moved(sides[name], make()) for name, make in NETWORKS.items())
    teacher.subject.network.eval().requires_grad_(False)
    images: Any = Few(range(3))
    return Prepared(
        parts=Parts(images, images, images, ("red", "green", "blue")),
        images=batches,
        views=Views(config, 3, SMALL, SMALL, CUDA),
        student=student,
        teacher=teacher if config.teacher else None,
        setting=Setting(config, 3, STEPS * N, student.side, teacher.side),
        copies=False,
        scores_teacher=True,
        leaves_parameters=False,
    )


class Few(list[int]):
    """Too few images to compare student and teacher on them."""

    name = "few"


def moved(examined: Examined, network: nn.Module) -> Examined:
    """The same with a network on the device."""
    subject, side = replace(examined.subject, network=network), replace(examined.side, network=network)
    return replace(examined, subject=subject, side=side)


def give_gradients(loss: Tensor) -> None:
    """Gradients for all that the loss depends on: autograd itself does not run without a GPU."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        nodes += [before for before, _ in node.next_functions]


def check_ends(done: Run) -> None:
    """What is read outside the steps is read by the files that are named."""
    assert len(done.between) == 3
    for found, files in zip(done.between, (START, END, END), strict=True):
        assert {place.split(":")[0] for place, _ in found} <= files
        assert all(count == 1 for (place, _), count in found.items() if place.startswith("sums.py"))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name == "ofa" else [pytest.mark.full])
        for name, kind in METHODS.items()
        if not issubclass(kind, BagMethod)
    ],
)
def test_the_steps_of_a_method_wait_for_nothing(
    method: str, sides: dict[str, Examined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(sides, tmp_path / "out", monkeypatch, method)
    assert done.in_steps == TIMED
    check_ends(done)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.9, "clip": 1.0, "accumulate": 2, "bf16": True, "channels_last": True},
        {
            "mixup": 0.8,
            "cutmix": 1.0,
            "erasing": 0.25,
            "optimizer": "lamb",
            "schedule": "step",
            "standardize_logits": True,
        },
    ],
    ids=["average, clipping and bfloat16", "mixing and lamb"],
)
def test_the_steps_of_other_options_wait_for_nothing(
    options: dict[str, Any], sides: dict[str, Examined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(sides, tmp_path / "out", monkeypatch, **options)
    assert done.in_steps == TIMED
    check_ends(done)


@pytest.mark.full
def test_float16_reads_one_number_an_update(
    sides: dict[str, Examined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's scaler asks whether the gradients are finite."""
    monkeypatch.setattr(TrainingStep, "overflows", False)  # the scale of the loss would be read as 0
    done = run(sides, tmp_path / "out", monkeypatch, fp16=True, clip=1.0)
    assert done.in_steps == {**TIMED, ("step.py:_update", "value"): 2 * STEPS}


def test_a_wait_that_is_hidden_in_the_loop_is_found_with_its_place(
    sides: dict[str, Examined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LossSums.add

    def waiting(self: LossSums, parts: dict[str, Tensor]) -> None:
        assert parts["ce"].item() < 1e30
        add(self, parts)

    monkeypatch.setattr(LossSums, "add", waiting)
    done = run(sides, tmp_path / "out", monkeypatch, "kd")
    assert done.in_steps == {**TIMED, ("test_training_loop.py:waiting", "value"): 2 * STEPS}


def test_a_tensor_that_stays_on_the_cpu_is_found(
    sides: dict[str, Examined], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LossSums.add

    def mixing(self: LossSums, parts: dict[str, Tensor]) -> None:
        add(self, {name: part + torch.zeros(1) for name, part in parts.items()})

    monkeypatch.setattr(LossSums, "add", mixing)
    with pytest.raises(RuntimeError, match="same device|two different devices"):
        run(sides, tmp_path / "out", monkeypatch, "kd")
