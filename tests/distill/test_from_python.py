"""cp.distill(): options by keyword, methods as values, networks of one's own, no files where no folder is named."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import cka_probe as cp
from cka_probe.distill.config import COMMON, Training
from cka_probe.distill.from_python import TrainingOptions
from cka_probe.distill.methods import METHODS
from cka_probe.errors import SpecError
from tests.distill.conftest import spec

QUICK: dict[str, Any] = {
    "epochs": 1, "batch_size": 12, "workers": 0, "device": "cpu", "probe_examples": 32, "validation": 0,
}  # fmt: skip


def test_the_keywords_are_the_options_of_training_with_their_types() -> None:
    hints, own = get_type_hints(TrainingOptions), get_type_hints(Training)
    assert set(hints) == COMMON - {"student", "teacher", "data", "method"}
    assert hints == {name: own[name] for name in hints}


def test_every_method_is_a_public_name() -> None:
    for method in METHODS.values():
        assert getattr(cp, method.__name__) is method


@pytest.mark.slow
def test_a_run_leaves_no_files_unless_a_folder_is_named(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    named: dict[str, Any] = {"student": spec("tiny_vit"), "teacher": spec("teacher"), "data": str(colours)}
    done = cp.distill(**named, method="kd", **QUICK)
    kept = cp.distill(**named, method=cp.KD(), out=tmp_path / "out", **QUICK)
    assert (done.out, kept.out) == (None, tmp_path / "out")
    assert not list((tmp_path / "temporary").glob("cka-probe-*"))
    assert done.student is not None
    assert kept.student is not None
    for one, other in zip(done.student.parameters(), kept.student.parameters(), strict=True):
        assert torch.equal(one, other)
    assert done.teacher is not None
    assert done.teacher.top1 == 1


@pytest.mark.slow
def test_networks_are_given_back_as_they_came(colours: Path) -> None:
    student, teacher = (cp.load_subject(spec(name)) for name in ("tiny_vit", "teacher"))
    before = {name: value.clone() for name, value in student.network.state_dict().items()}
    student.network.train()
    done = cp.distill(student=student, teacher=teacher, data=str(colours), method=cp.KD(temperature=2), **QUICK)
    assert student.network.training
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.network.parameters())
    by_name = cp.distill(
        student=spec("tiny_vit"), teacher=spec("teacher"), data=str(colours), method=cp.KD(temperature=2), **QUICK
    )
    assert done.student is not None
    assert by_name.student is not None
    for one, other in zip(done.student.parameters(), by_name.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_module_is_a_student(colours: Path) -> None:
    network = cp.load_subject(spec("tiny_vit")).network
    done = cp.distill(student=network, data=str(colours), method="none", image_size=16, **QUICK)
    assert done.result["student"]["name"] == "student"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "distill has no option 'epoch'. Close names: epochs"),
        (
            {"gamma": 1.2},
            r"gamma is an option of ofa and fbt. Give it with the method: .*OFA\(gamma=...\)",
        ),
        ({"feature_weight": 1.0}, "feature_weight is an option of fbt, fitnet, cc, rkd, crd and rsd"),
        ({"method": "kdd"}, "--method must be one of .* Close names: kd"),
        ({"method": 3}, "--method must be the name of a method, or a method, but is 3"),
        ({"method": cp.KD(temperature=0)}, "--temperature must be a number above 0"),
        ({"method": cp.OFA(stages="x")}, "--stages must be all, none, last, auto, or numbers"),
        ({"teacher": None}, "--method ofa needs a teacher"),
        ({"lr": -1}, "--lr must be"),
        ({"student": 3}, "A model must be a spec"),
        ({"student": torch.zeros(8, 2)}, "The student must be a network, but 'student' is features"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cp.distill(**{"student": "zoo:vit@random", "teacher": "zoo:cnn", **options})
