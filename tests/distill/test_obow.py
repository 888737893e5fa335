"""Training without labels: exact resume, several processes, the teacher, what is scored and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.bags.moving_average import MovingAverage, momentum
from cka_probe.distill.config import Training
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import report_page
from cka_probe.distill.preparation import with_shared_batch_norms
from cka_probe.distill.training.run import loop
from cka_probe.distill.training.train import distill
from cka_probe.errors import DataError, SpecError
from tests.distill import networks
from tests.distill.conftest import spec
from tests.distill.test_processes import on_two_processes
from tests.distill.training.test_train import assert_same, killed_after

Options = Callable[..., Training]
pytestmark = pytest.mark.slow


def obow(options: Options, **changes: Any) -> Training:
    """Two epochs of six steps of 12 images; validation images only where they are asked for."""
    base = {
        "method": "obow", "teacher": None, "student": spec("plain_cnn"), "student_layers": "stage1,stage2",
        "epochs": 2, "warmup_epochs": 0, "crop_scale": (0.08, 1.0), "crops": "2x12", "patches": "3x8", "words": 24,
    }  # fmt: skip
    return options(**{**base, **changes})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in no class folders, some in a folder below."""
    root = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    (root / "more").mkdir()
    for index in range(36):
        pixels = rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("more" if index % 3 else ".") / f"{index}.png")
    return root


def test_it_learns_words_and_leaves_the_classifier(options: Options, tmp_path: Path) -> None:
    done = distill(obow(options, epochs=4, lr=0.01), tmp_path / "out")
    first, last = done.metrics[0], done.metrics[-1]
    assert set(last) >= {"bag_crops", "bag_patches", "test_knn"}
    assert not {"ce", "train_top1", "test_top1"} & set(last)
    assert last["loss"] < first["loss"]
    assert done.accuracy is not None
    record = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["result"]
    assert record["knn"]["top1"] == done.accuracy.top1 == last["test_knn"]
    assert "top1" not in record
    weights, start = load_file(tmp_path / "out" / "student.safetensors"), networks.plain_cnn().state_dict()
    assert torch.equal(weights["fc.weight"], start["fc.weight"])
    assert not torch.equal(weights["stage1.0.weight"], start["stage1.0.weight"])
    assert read_record(tmp_path / "out").finished
    again = distill(obow(options, epochs=4, lr=0.01), tmp_path / "out", resume=True)
    assert again.accuracy is not None
    assert again.accuracy.top1 == done.accuracy.top1


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"student": spec("tiny_cnn"), "student_layers": "stages", "image_size": 32, "crops": "2x24"}, 8),
        ({"accumulate": 2, "optimizer": "sgd", "score_every": 1}, 3),
    ],
    ids=["batch norm and dropout", "with accumulation"],
)
def test_a_killed_run_ends_in_the_same_bits(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], steps: int
) -> None:
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    config = obow(options, **changes, checkpoint_minutes=0)
    whole = distill(config, tmp_path / "whole")
    killed_after(steps, monkeypatch, config, tmp_path / "killed")
    resumed = distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    for one, other in zip(whole.metrics, resumed.metrics, strict=True):
        del one["images_per_second"], other["images_per_second"]
        assert one == other


def test_the_teacher_moves_by_alpha_before_each_update(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow, seen = MovingAverage.follow, []

    def noted(self: MovingAverage, student: torch.nn.Module, alpha: float) -> None:
        before = [value.clone() for value in self.network.parameters()]
        follow(self, student, alpha)
        for old, own, other in zip(before, self.network.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(own, alpha * old + (1 - alpha) * other.detach())
        seen.append(alpha)

    monkeypatch.setattr(MovingAverage, "follow", noted)
    distill(obow(options, accumulate=2), tmp_path / "out")  # two epochs of three updates
    expected = [1 - 0.01 * (1 + cos(pi * step / 6)) / 2 for step in range(6)]
    assert seen == pytest.approx(expected)
    assert seen[0] == 0.99
    assert momentum(1) == 1


def test_batch_norms_of_the_teacher_have_statistics_of_their_own_and_its_dropout_is_off() -> None:
    student = networks.tiny_cnn().train()
    teacher = MovingAverage(networks.tiny_cnn()).train()
    modes = {type(module).__name__: module.training for module in teacher.network.modules()}
    assert (modes["BatchNorm2d"], modes["ResNet"], modes["Conv2d"]) == (True, False, False)
    before = teacher.network.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    teacher.follow(student, 0.5)
    assert torch.equal(teacher.network.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]
    teacher.network(torch.randn(4, 3, 16, 16))
    assert not torch.equal(teacher.network.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]
    assert not any(module.training for module in teacher.eval().network.modules())


@pytest.mark.full
def test_two_processes_train_as_one(options: Options, tmp_path: Path) -> None:
    """The student has no batch norm, whose statistics are those of one process."""
    changes = {"optimizer": "sgd", "lr": 0.01}
    on_two_processes([obow(options, batch_size=6, **changes)], tmp_path)
    alone = distill(obow(options, batch_size=12, **changes), tmp_path / "one")
    one, two = (load_file(tmp_path / which / "student.safetensors") for which in ("one", "obow"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=name)
    record = read_record(tmp_path / "obow")
    assert record.result["processes"] == 2
    assert alone.accuracy is not None
    assert record.result["knn"]["top1"] == alone.accuracy.top1
    for part in ("bag_crops", "bag_patches"):
        assert record.column(part) == pytest.approx([row[part] for row in alone.metrics], rel=1e-5)


@pytest.mark.full
def test_a_folder_without_classes_is_trained_on_and_not_scored(options: Options, plain: Path, tmp_path: Path) -> None:
    done = distill(obow(options, data=str(plain)), tmp_path / "out")
    assert done.accuracy is None
    assert done.result["images"] == {"train": 36, "validation": 0, "test": 0}
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "the images have no labels" in (tmp_path / "out" / "report.html").read_text()
    assert distill(obow(options, data=str(plain)), tmp_path / "out", resume=True).accuracy is None
    with pytest.raises(DataError, match="at least 2 classes"):
        distill(options(data=str(plain), method="none", teacher=None), tmp_path / "labels")


@pytest.mark.full
def test_class_folders_are_ignored_in_training(options: Options, colours: Path, tmp_path: Path) -> None:
    """The same images without class folders, in the same order, end in the same weights."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate(sorted((colours / "train").rglob("*.png"))):
        (flat / f"{index:03}.png").write_bytes(path.read_bytes())
    distill(obow(options, data=str(flat)), tmp_path / "one")
    distill(obow(options), tmp_path / "two")
    assert torch.equal(
        *(load_file(tmp_path / name / "student.safetensors")["stage2.0.weight"] for name in ("one", "two"))
    )


def test_it_is_scored_on_validation_images_in_some_epochs(options: Options, tmp_path: Path) -> None:
    done = distill(obow(options, epochs=3, score_every=2, validation=0.2, batch_size=6), tmp_path / "out")
    assert ["validation_knn" in row for row in done.metrics] == [False, True, True]
    assert read_record(tmp_path / "out").column("validation_knn")[0] is None
    page = report_page(read_record(tmp_path / "out"))
    assert "Pretrained without labels by OBoW" in page
    assert "trained on, without their labels" in page


def test_it_is_compared_with_a_reference(options: Options, tmp_path: Path) -> None:
    distill(obow(options, reference=spec("teacher"), validation=0.5, probe_examples=36, batch_size=6), tmp_path / "out")
    block = read_record(tmp_path / "out").similarities["after"]
    assert {layer.model for layer in block.cols} == {"teacher"}
    assert "Student and reference, layer by layer" in report_page(read_record(tmp_path / "out"))


def test_the_student_goes_on_as_a_network_of_its_own(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distill(obow(options), tmp_path / "out")
    student = f"{spec('plain_cnn')}@{tmp_path / 'out' / 'student.safetensors'}"
    score = cp.evaluate(student, data=options().data, by="knn", workers=0, device="cpu")
    assert score.top1 == yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["result"]["knn"]["top1"]
    assert "its classifier not at all" not in caplog.text
    cp.evaluate(student, data=options().data, workers=0, device="cpu")
    assert "its classifier not at all. Score its features: --by knn" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 25}, "--words must be a multiple of the 12 images of a step on all processes, but is 25. Use"),
        ({"levels": "2"}, "maps are 5 × 5 or larger, but names 2. Its stages: 1 (stage1): 8 × 8; 2 (stage2): 4 × 4"),
        ({"levels": "auto"}, "--levels must be last, or numbers such as 3,4, but is 'auto'"),
        ({"student_layers": "stage2"}, "needs? a stage whose map is 5 × 5 or larger, but .* has none at 16 × 16 px"),
        ({"crops": "two"}, "--crops must be none or COUNTxSIZE, with a count from 1 to 16"),
        ({"crops": "none"}, "--crops must be how many and their size in pixels, such as 2x160, but is none"),
        ({"patches": "10x8"}, "--patches must be none or COUNTxSIZE, with a count from 1 to 9"),
        ({"teacher": spec("teacher")}, "--method obow has no --teacher: it is the student's own moving average"),
        ({"mixup": 0.2}, "--mixup needs labels"),
        ({"patience": 2, "validation": 0.5}, "--patience needs labels"),
        ({"ema": 0.9}, "--ema needs labels"),
        ({"teacher_cache": "cache"}, "--teacher-cache stores logits and pooled features, but --method obow needs"),
        ({"rand_augment": "rand-m9"}, "has augmentation of its own, but --rand-augment is 'rand-m9'"),
        ({"train": "head"}, "--train head trains the classifier alone"),
        ({"ce_weight": 1.0}, "--ce-weight must be a number from 0 to 0, but is 1.0"),
        ({"student": spec("plain_vit"), "student_layers": "stages", "crops": None, "patches": None}, "has none at 16"),
        ({"student": "zoo:vit@random", "student_layers": "stages"}, "cannot run on 12 × 12 px (--crops). Use 2x32"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: Options, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        distill(obow(options, **changes), tmp_path / "out")
    pattern = message if ".*" in message else re.escape(message)
    assert re.search(pattern, str(error.value)), error.value
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_it_trains_in_bfloat16_and_channels_last(options: Options, tmp_path: Path) -> None:
    """Of 32 px: PyTorch 2.14's gradients of 3 × 3 convolutions in bfloat16 are NaN on maps of 1 × 1, on CPUs."""
    changes = {"student": spec("tiny_cnn"), "student_layers": "stages", "image_size": 32, "epochs": 1}
    changes |= {"crops": "2x32", "patches": "none"}
    whole = distill(obow(options, **changes), tmp_path / "whole")
    mixed = distill(obow(options, **changes, bf16=True, channels_last=True), tmp_path / "mixed")
    assert mixed.metrics[0]["loss"] == pytest.approx(whole.metrics[0]["loss"], rel=0.1)


def test_batch_norms_that_are_shared_keep_weights_and_outputs() -> None:
    """Several GPUs compute them together, which a CPU cannot: here it is looked at what they are."""
    network = networks.tiny_cnn().eval()
    images = torch.randn(2, 3, 16, 16)
    before, output = network.state_dict(), network(images)
    shared = with_shared_batch_norms(network)
    assert shared.state_dict().keys() == before.keys()
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in shared.modules())
    torch.testing.assert_close(shared.eval()(images), output)


def test_its_flags_are_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--method", "obow", "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for flag in (
        "--levels",
        "--words",
        "--sharpness",
        "--kappa",
        "--crops",
        "--patches",
        "--reference",
        "--score-every",
    ):
        assert flag in shown
    assert "--ce-weight" not in shown
