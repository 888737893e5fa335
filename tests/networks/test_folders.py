"""A folder as a model spec, and the config.json beside weights: what they say is used wherever a model is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.training.train import distill
from cka_probe.errors import CheckpointError, SpecError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import base_of, load_subject
from cka_probe.networks.specs import ModelSpec, check_spec
from cka_probe.probing.compare import compare
from cka_probe.probing.option_checks import check_models, input_paths
from cka_probe.probing.options import Images
from cka_probe.probing.subjects import preprocessed

SEEN = {
    "input_size": [3, 48, 40], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0,
    "interpolation": "bilinear", "crop_mode": "squash",
}  # fmt: skip
LOOK = Preprocessing((3, 48, 40), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0, "squash")
FACTORY = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.last = nn.Linear(6, classes)
    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).mean((2, 3)))
def takes(num_classes=7): return Net(num_classes)
def needs(num_classes): return Net(num_classes)
def fixed(): return Net(7)
class Resets(Net):
    def reset_classifier(self, classes): self.last = nn.Linear(6, classes)
def resets(): return Resets(7)
def bfloat16(): return Net(3).bfloat16()
def double(): return Net(3).double()
def half(): return Net(3).half()
"""
OPTIONS: dict[str, Any] = {
    "method": "none", "epochs": 1, "batch_size": 12, "workers": 0, "device": "cpu", "image_size": 16, "lr": 3e-3,
}  # fmt: skip


def saved(folder: Path, config: Any, name: str = "model.safetensors", **options: Any) -> Path:
    """A folder with the weights of a ResNet-10-T of 3 classes, and a config.json."""
    folder.mkdir(parents=True)
    save_file(timm.create_model("resnet10t", num_classes=3, **options).state_dict(), folder / name)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def described(**more: Any) -> dict[str, Any]:
    return {
        "architecture": "resnet10t",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": SEEN,
    } | more


def test_a_config_beside_the_weights_says_how_the_network_sees_images(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", described())
    for spec in (f"resnet10t@{folder}/model.safetensors", str(folder), f"local-dir:{folder}"):
        subject = load_subject(spec)
        assert subject.preprocessing == LOOK, spec
        assert subject.classes == ("a", "b", "c")
    assert load_subject(str(folder)).name == "run"
    assert load_subject(f"{folder},view_size=64").preprocessing == replace(LOOK, size=(3, 64, 64))
    given = preprocessed(load_subject(str(folder)), Images(image_size=20, mean=(0.0, 0.0, 0.0)))
    assert given.preprocessing == replace(LOOK, size=(3, 20, 20), mean=(0.0, 0.0, 0.0))


def test_timm_s_older_format_is_read(tmp_path: Path) -> None:
    assert load_subject(str(saved(tmp_path / "run", {"architecture": "resnet10t", **SEEN}))).preprocessing == LOOK


def test_a_view_size_is_the_image_s_and_not_the_network_s() -> None:
    subject = load_subject("resnet10t,view_size=(64,48)@random")
    assert subject.preprocessing.size == (3, 64, 48)
    assert subject.preprocessing.crop_pct == load_subject("resnet10t@random").preprocessing.crop_pct
    assert preprocessed(subject, Images(image_size=20)).preprocessing.size == (3, 64, 48), "the spec is the nearer"
    for wrong in ("0", "abc", "(1,2,3)"):
        with pytest.raises(SpecError, match="view_size must be a size"):
            ModelSpec.parse(f"resnet10t,view_size={wrong}")


def test_a_config_of_another_library_or_network_is_ignored_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = saved(tmp_path / "other", {"architectures": ["ResNetForImageClassification"], "model_type": "resnet"})
    plain = load_subject("resnet10t@random").preprocessing
    assert load_subject(f"resnet10t@{other}/model.safetensors").preprocessing == plain
    assert "is not in timm's format" in caplog.text
    vit = saved(tmp_path / "vit", described(architecture="vit_tiny_patch16_224"))
    assert load_subject(f"resnet10t@{vit}/model.safetensors").preprocessing == plain
    assert "describes vit_tiny_patch16_224, not resnet10t, and is ignored" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        "{", described(pretrained_cfg=3), described(pretrained_cfg={"input_size": [3, 32]}),
        described(pretrained_cfg={"mean": [0.5, 0.5]}), described(pretrained_cfg={"std": [0, 1, 1]}),
        described(pretrained_cfg={"crop_pct": -1}), described(pretrained_cfg={"crop_mode": "middle"}),
        described(pretrained_cfg={"input_size": [3, -1, 4]}), described(pretrained_cfg={"mean": "dark"}),
    ],
)  # fmt: skip
def test_a_damaged_config_says_what_to_do(tmp_path: Path, config: Any) -> None:
    folder = saved(tmp_path / "run", config)
    with pytest.raises(CheckpointError, match=r"config\.json .* cannot be used: .*Restore it, or rename it"):
        load_subject(f"resnet10t@{folder}/model.safetensors")


def test_a_folder_comes_before_a_timm_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "resnet18", described())
    assert type(load_subject("resnet18").network.layer1[0]).__name__ == "BasicBlock"
    assert load_subject("resnet18").preprocessing == LOOK
    (tmp_path / "resnet34").mkdir()
    assert ModelSpec.parse("resnet34").folder is None, "it holds no model"
    with pytest.raises(SpecError, match=r"resnet34 holds no run\.yaml"):
        load_subject("./resnet34")
    with pytest.raises(SpecError, match="does not exist"):
        check_spec("runs/nothing")
    assert input_paths(["./resnet18"]) == [Path("resnet18")]


def test_other_weights_of_a_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a,b@c", described(), in_chans=3)
    other = timm.create_model("resnet10t", num_classes=3).state_dict()
    save_file(other, folder / "best.safetensors")
    (tmp_path / "run").symlink_to(folder)
    first = load_subject(str(folder)).network.state_dict()
    best = load_subject(f"{tmp_path / 'run'}@best.safetensors")
    assert best.name == "a,b@c@best"
    assert torch.equal(best.network.state_dict()["fc.weight"], other["fc.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert load_subject(f"{tmp_path / 'run'}@random:3").source["weights"] == "random, seed 3"
    with pytest.raises(SpecError, match=r"holds no file nope\.pth.*best\.safetensors, model\.safetensors"):
        load_subject(f"{tmp_path / 'run'}@nope.pth")
    (folder / "model.safetensors").rename(folder / "x.pth")
    with pytest.raises(SpecError, match=r"several files of weights.*best\.safetensors, x\.pth"):
        load_subject(str(folder))
    (folder / "x.pth").unlink()
    (folder / "best.safetensors").unlink()
    with pytest.raises(SpecError, match="holds no weights"):
        check_models([str(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("student", ["zoo:mlp@random", "zoo:cnn,in_chans=1@random", "resnet10t,in_chans=1@random"])
def test_a_run_s_folder_is_its_student(colours: Path, tmp_path: Path, student: str) -> None:
    size = 32 if student.startswith("zoo") else 16
    run = tmp_path / "run"
    done = distill(Training(student=student, data=str(colours), **OPTIONS | {"image_size": size}), run)
    base = student.partition("@")[0]
    for spec in (str(run), f"{base}@{run}/student.safetensors"):
        subject = load_subject(spec)
        assert subject.preprocessing.size[1:] == (size, size)
        assert subject.classes == ("0 red", "1 green", "2 blue")
        accuracy = evaluate(spec, data=str(colours), device="cpu", workers=0)
        assert accuracy.top1 == done.accuracy.top1, spec


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["takes", "needs", "resets", "bfloat16", "double", "half"])
def test_a_factory_s_student_is_loaded_again(colours: Path, tmp_path: Path, factory: str) -> None:
    file = tmp_path / "nets.py"
    file.write_text(FACTORY)
    run = tmp_path / "run"
    student = f"{file}:{factory}"
    done = distill(Training(student=student, data=str(colours), student_layers="first,second", **OPTIONS), run)
    for spec in (str(run), f"{student}@{run}/student.safetensors"):
        assert load_subject(spec).network.last.weight.shape == (3, 6)
        assert load_subject(spec).preprocessing.size == (3, 16, 16)
        assert evaluate(spec, data=str(colours), device="cpu", workers=0).top1 == done.accuracy.top1
    file.rename(tmp_path / "moved.py")
    with pytest.raises(SpecError, match=r"built by .*nets\.py:\w+, but that file does not exist here"):
        load_subject(str(run))


def test_a_network_whose_classes_cannot_change_is_refused(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    config = Training(student=f"{tmp_path / 'nets.py'}:fixed", data=str(colours), **OPTIONS)
    with pytest.raises(SpecError, match=r"must have 3 classes.*has 7, and neither a reset_classifier"):
        distill(config, tmp_path / "run")


@pytest.mark.slow
def test_folders_that_hold_no_student_are_refused(colours: Path, tmp_path: Path) -> None:
    from cka_probe.cli.main import main

    out = tmp_path / "compared"
    main(["compare", "zoo:cnn", "zoo:vit", "--data", "digits", "--examples", "16", "--batch-size", "8", "--layers",
          "stages", "--device", "cpu", "--out", str(out)])  # fmt: skip
    with pytest.raises(SpecError, match="holds the results of compare"):
        load_subject(str(out))

    def stop(_: Any) -> None:
        raise RuntimeError("stopped")

    unfinished = tmp_path / "unfinished"
    config = Training(student="zoo:cnn@random", data=str(colours), **OPTIONS | {"image_size": 32})
    with pytest.raises(RuntimeError, match="stopped"):
        distill(config, unfinished, progress=stop)
    with pytest.raises(SpecError, match=r"not finished.*distill --resume --out"):
        check_models([str(unfinished)])


@pytest.mark.slow
def test_a_run_s_folder_is_compared_and_teaches(colours: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = Training(student="zoo:cnn", data=str(colours), **OPTIONS | {"image_size": 32, "epochs": 4})
    distill(config, run)
    sim = compare(
        {"before": "zoo:cnn", "after": str(run)}, data=str(colours), layers="stages", examples=16, batch_size=8
    )
    assert sim.models == ("before", "after")
    next_run = tmp_path / "next"
    taught = Training(student=str(run), teacher=str(run), data=str(colours), **OPTIONS | {"method": "kd"})
    distill(taught, next_run)
    shutil.rmtree(run)
    assert load_subject(str(next_run)).network.fc.weight.shape[0] == 3, "it needs no folder but its own"


def test_the_code_of_a_folder_s_network_is_known(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    student = f"{tmp_path / 'nets.py'}:takes"
    distill(Training(student=student, data=str(colours), student_layers="first,second", **OPTIONS), tmp_path / "run")
    assert base_of(str(tmp_path / "run")) == student
    assert load_subject(str(tmp_path / "run")).source["code_sha256"] == load_subject(student).source["code_sha256"]
