"""Which part of the data decides what: the best epoch, patience, the average; and what the test images are for."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from cka_probe.cli.main import main
from cka_probe.distill.config import Training
from cka_probe.distill.config_checks import check_training
from cka_probe.distill.evaluation.accuracy import accuracy_of
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.options import Evaluation
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import _data
from cka_probe.distill.recipes import recipe, recorded
from cka_probe.distill.training import scores
from cka_probe.distill.training.best import Best, out_of_patience
from cka_probe.distill.training.run import loop
from cka_probe.distill.training.run.finish import Distilled
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import SpecError
from cka_probe.images.parts import open_parts
from cka_probe.networks.models import load_subject
from cka_probe.runtime.world import World
from tests.distill.conftest import spec
from tests.distill.training.test_train import killed_after

Options = Callable[..., Training]
CPU = World(torch.device("cpu"))
ALONE: dict[str, Any] = {"method": "none", "teacher": None, "student": spec("plain_vit")}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is evaluated on, in order."""
    names: list[str] = []

    def noting(subject: Any, images: Any, *rest: Any) -> Accuracy:
        names.append(images.name.rpartition("/")[2])
        return accuracy_of(subject, images, *rest)

    monkeypatch.setattr(scores, "accuracy_of", noting)
    return names


def scripted(monkeypatch: pytest.MonkeyPatch, *epochs: tuple[float, ...]) -> None:
    """Validation top-1 as it is written, an epoch after the other: of the last weights, and of the average."""
    left = [iter(values) for values in epochs]
    whole = scores.Scores.epoch

    def told(self: scores.Scores, networks: dict[str, nn.Module], further: Any = None) -> dict[str, float]:
        values = next(values for values in zip(*left, strict=True))
        return dict(zip(whole(self, networks), values, strict=True))

    monkeypatch.setattr(scores.Scores, "epoch", told)


def accuracy(config: Training, file: Path, part: str) -> float:
    """Top-1 of an exported file on a part of the data, from the files alone."""
    parts = open_parts(config.data, validation=config.validation, seed=config.seed)
    student = load_subject(f"{spec('plain_vit')}@{file}")
    return accuracy_of(student, getattr(parts, part), CPU, Evaluation(workers=0)).top1


@pytest.mark.slow
def test_nothing_is_decided_on_test_images(options: Options, tmp_path: Path, seen: list[str]) -> None:
    config = options(validation=0.25, epochs=2, patience=2, stages="auto", probe_epochs=1)
    done = distill(config, tmp_path / "out")
    assert seen[:3] == ["train", "train (validation)", "train (validation)"]
    assert done.result["best"]["epoch"] == 2
    assert seen[3:] == ["val", "val"], "student and teacher once, at the end"
    assert done.result["images"] == {"train": 54, "validation": 18, "test": 36}
    assert done.teacher == Accuracy(36, 1.0, 1.0)
    assert done.result["teacher_guard"] == {"part": "training", "images": 54, "top1": 1.0}
    assert yaml.safe_load((tmp_path / "out" / "stages.yaml").read_text())["part"] == "training", "18 are too few"
    uses = {part: use for part, _, use in _data(read_record(tmp_path / "out"))}
    assert uses["training"] == "trained on; chose the stages, without augmentation"
    assert uses["validation"].startswith("chose the best epoch, when the run ended (--patience); ")


@pytest.mark.slow
def test_the_best_weights_are_kept_beside_the_last(options: Options, tmp_path: Path) -> None:
    config = options(**ALONE, validation=0.25, epochs=4)
    out = tmp_path / "out"
    done = distill(config, out)
    record = yaml.safe_load((out / "run.yaml").read_text())["result"]
    values = [row["validation_top1"] for row in done.metrics]
    best = record["best"]
    assert best["epoch"] == values.index(max(values)) + 1, "the first of equals"
    assert (best["file"], best["weights"], best["validation_top1"]) == ("best.safetensors", "last", max(values))
    last, kept = load_file(out / "student.safetensors"), load_file(out / "best.safetensors")
    assert last.keys() == kept.keys()
    assert accuracy(config, out / "best.safetensors", "validation") == best["validation_top1"]
    assert accuracy(config, out / "best.safetensors", "test") == best["top1"]
    assert accuracy(config, out / "student.safetensors", "validation") == values[-1] == record["validation_top1"]
    assert accuracy(config, out / "student.safetensors", "test") == record["top1"] == done.accuracy.top1
    torch.testing.assert_close(done.student.state_dict() if done.student else {}, last, rtol=0, atol=0)


@pytest.mark.slow
def test_the_best_epoch_is_the_first_of_equals_and_its_weights_are_of_it(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends with that epoch, its schedule the same, has the same weights."""
    config = options(**ALONE, validation=0.25, epochs=3, schedule="none", warmup_epochs=0)
    with monkeypatch.context() as patched:
        scripted(patched, (0.2, 0.6, 0.6))
        done = distill(config, tmp_path / "long")
    distill(options(**ALONE, validation=0.25, epochs=2, schedule="none", warmup_epochs=0), tmp_path / "short")
    assert done.result["best"]["epoch"] == 2
    best, short = (load_file(tmp_path / name) for name in ("long/best.safetensors", "short/student.safetensors"))
    for name in best:
        assert torch.equal(best[name], short[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("validated", "tests"), [((0.2, 0.6), 1), ((0.6, 0.2), 2)])
def test_weights_that_are_the_last_and_the_best_are_tested_once(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[str],
    validated: tuple[float, ...], tests: int,
) -> None:  # fmt: skip
    scripted(monkeypatch, validated)
    config, out = options(**ALONE, validation=0.25, epochs=2), tmp_path / "out"
    best = distill(config, out).result["best"]
    assert seen.count("val") == tests
    assert accuracy(config, out / "best.safetensors", "test") == best["top1"]


@pytest.mark.slow
def test_without_validation_nothing_is_chosen_and_the_accuracies_are_of_the_test(
    options: Options, tmp_path: Path, seen: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cka_probe"):
        done = distill(options(**ALONE, epochs=2, ema=0.5), tmp_path / "out")
    assert seen == ["val"] * 5
    assert not (tmp_path / "out" / "best.safetensors").exists()
    assert done.result["best"] is None
    assert done.result["weights"] == "average"
    assert {"test_top1", "test_top1_ema"} < set(done.metrics[0])
    assert caplog.text.count("(for information only)") == 2
    assert "the average is kept; there are no validation images" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "average", "kept"), [(0.5, 0.4, "last"), (0.4, 0.5, "average"), (0.5, 0.5, "average")]
)
def test_of_last_weights_and_average_the_better_one_is_exported(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, average: float, kept: str
) -> None:
    scripted(monkeypatch, (0.1, last), (0.9, average))
    config, out = options(**ALONE, validation=0.25, epochs=2, ema=0.9), tmp_path / "out"
    done = distill(config, out)
    assert (done.result["weights"], done.result["validation_top1"]) == (kept, max(last, average))
    assert done.result["best"]["epoch"] == 1
    assert done.result["best"]["weights"] == "average"
    assert accuracy(config, out / "student.safetensors", "test") == done.accuracy.top1


@pytest.mark.slow
def test_the_average_warms_up_as_in_timm(options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In 6 updates, from the weights after each: a decay of 0 first, then 1 - (1 + t) ** (-2 / 3)."""
    kept: list[dict[str, torch.Tensor]] = []
    whole = TrainingStep._update

    def noting(self: TrainingStep) -> None:
        whole(self)
        kept.append({name: tensor.clone().double() for name, tensor in self.network.state_dict().items()})

    config = options(**ALONE, epochs=1, ema=0.9998)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingStep, "_update", noting)
        distill(config, tmp_path / "out")
    average = kept[0]
    for update, weights in enumerate(kept[1:], 1):
        decay = 1 - (1 + update) ** (-2 / 3)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    exported = load_file(tmp_path / "out" / "student.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(exported[name].double(), value, rtol=1e-5, atol=1e-6)
    assert "--ema 0.9998 is slower than the run" in caplog.text
    assert "would hold 100% of the initial weights" in caplog.text
    assert "--ema 0.61 or less fits" in caplog.text  # 0.05 ** (1 / 6)


@pytest.mark.slow
def test_patience_ends_a_run_and_leaves_its_schedule(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, (0.2, 0.6, 0.6, 0.5, 0.9))
    config = options(**ALONE, validation=0.25, epochs=5, patience=2, warmup_epochs=0)
    done = distill(config, tmp_path / "out")
    assert [row["epoch"] for row in done.metrics] == [1, 2, 3, 4]
    assert (done.result["best"]["epoch"], done.result["epochs"]) == (2, 4)
    assert done.metrics[-1]["lr"] == pytest.approx(1e-5 + (3e-3 - 1e-5) * (1 + torch.pi * 0 + _cosine(4 / 5)) / 2)
    again = distill(config, tmp_path / "out", resume=True)
    assert again.result["best"] == done.result["best"]


def _cosine(share: float) -> float:
    return float(torch.cos(torch.tensor(share * torch.pi, dtype=torch.float64)))


def test_patience_counts_epochs() -> None:
    best = Best(3, "last", 0.5, {})
    assert [out_of_patience(best, epoch, 2) for epoch in (3, 4, 5)] == [False, False, True]
    assert not out_of_patience(best, 99, None)
    assert not out_of_patience(None, 99, 1)


def test_patience_needs_validation_images(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--patience needs validation images, but --validation is 0"):
        distill(options(patience=2), tmp_path / "out")
    for value in (-0.1, 1, float("nan")):
        with pytest.raises(SpecError, match="--validation must be"):
            check_training(options(validation=value))


@pytest.mark.slow
def test_a_killed_run_keeps_its_best_weights_and_its_average(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(**ALONE, validation=0.25, epochs=4, ema=0.9, patience=2, checkpoint_minutes=0)
    runs: dict[str, Distilled] = {}
    for name in ("whole", "killed"):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "CHECK_EVERY", 2)
            if name == "killed":
                with monkeypatch.context() as inner:
                    scripted(inner, (0.2, 0.6), (0.7, 0.5))
                    killed_after(10, monkeypatch, config, tmp_path / name)  # in the third epoch, of 4 steps each
                scripted(patched, (0.65, 0.5), (0.6, 0.3))
            else:
                scripted(patched, (0.2, 0.6, 0.65, 0.5), (0.7, 0.5, 0.6, 0.3))
            runs[name] = distill(config, tmp_path / name, resume=True)
    for file in ("student.safetensors", "best.safetensors"):
        one, other = (load_file(tmp_path / name / file) for name in runs)
        for name in one:
            assert torch.equal(one[name], other[name]), name
    best = runs["whole"].result["best"]
    assert best == runs["killed"].result["best"]
    assert (best["epoch"], best["weights"], runs["whole"].result["epochs"]) == (1, "average", 3)
    for first, second in zip(*(runs[name].metrics for name in runs), strict=True):
        assert {**first, "images_per_second": 0} == {**second, "images_per_second": 0}


@pytest.mark.slow
def test_training_top1_is_of_the_batches_as_they_were_named(options: Options, tmp_path: Path) -> None:
    """In one epoch without updates (lr 1e-12), it is the accuracy of the network in training mode."""
    given = {**ALONE, "epochs": 1, "lr": 1e-12, "min_lr": 0, "crop_scale": (1, 1), "crop_ratio": (1, 1), "flip": 0}
    config = options(**given)
    row = distill(config, tmp_path / "out").metrics[0]
    right = accuracy(config, tmp_path / "out" / "student.safetensors", "train")
    assert row["train_top1"] == pytest.approx(right, abs=0.03)  # a crop of the whole image is resampled
    assert "train_top1" not in distill(options(**given, mixup=0.5), tmp_path / "mixed").metrics[0]


@pytest.mark.slow
def test_every_epoch_has_its_line_and_the_time_is_told_first(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cka_probe"):
        distill(options(method="kd", validation=0.25, epochs=2), tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records]
    assert "Images: 54 for training, 18 for validation, 36 for the test." in lines
    (about,) = [index for index, line in enumerate(lines) if line.startswith("About ")]
    epochs = [index for index, line in enumerate(lines) if line.startswith("epoch ")]
    assert about < epochs[0]
    assert "for 2 epochs of 4 steps" in lines[about]
    assert len(epochs) == 2
    for part in ("epoch 2 of 2: loss ", "(ce ", ", kd ", "training top-1 ", "validation top-1 ", "lr ", "0:00 left"):
        assert part in lines[epochs[1]]


@pytest.mark.slow
def test_exit_branches_are_told_by_name(options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cka_probe"):
        distill(options(stages="1,3", epochs=1), tmp_path / "out")
    assert "Exit branches at stages 1 (blocks.0) and 3 (blocks.4), " in caplog.text


@pytest.mark.full
def test_auto_with_few_images_is_warned_of_by_the_control_or_refused(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    auto: dict[str, Any] = {"stages": "auto", "epochs": 2}
    distill(options(**auto, probe_examples=12), tmp_path / "warned")
    assert "on 12 images, in batches of 4. Shuffled images, which share nothing, reach a CKA of 0." in caplog.text
    with pytest.raises(SpecError, match=r"must compare student and teacher on 8 images or more"):
        distill(options(**auto, probe_examples=7), tmp_path / "refused")
    assert not (tmp_path / "refused").exists() or not (tmp_path / "refused" / "run.yaml").exists()
    caplog.clear()
    distill(options(**auto, probe_examples=64), tmp_path / "enough")
    assert "Shuffled images, which share nothing" not in caplog.text


@pytest.mark.full
def test_top5_is_there_from_six_classes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["distill", "--method", "none", "--student", "zoo:mlp@random", "--epochs", "1", "--batch-size", "512"]
    assert main([*base, "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "of 359 test images" in said
    assert "Top-5" in said
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert "validation_top5" in next(csv.reader(file))


def test_recipes_of_papers_keep_all_training_images() -> None:
    for name in ("cifar-cnn", "cifar-token", "imagenet-cnn", "imagenet-token"):
        assert recipe(name)["validation"] == 0
    assert "validation" not in recipe("digits")


@pytest.mark.slow
def test_runs_of_before_can_still_be_read(options: Options, tmp_path: Path) -> None:
    """A run of one held-out part, as its files were."""
    out = tmp_path / "out"
    distill(options(**ALONE, epochs=2, ema=0.5), out)
    record = yaml.safe_load((out / "run.yaml").read_text())
    for name in ("images", "weights", "validation_top1", "teacher_guard", "epochs", "best"):
        del record["result"][name]
    record["result"] |= {"held_out": 36, "top5": 1.0}
    record["options"].pop("validation")
    (out / "run.yaml").write_text(yaml.safe_dump(record))
    text = (out / "metrics.csv").read_text()
    (out / "metrics.csv").write_text(text.replace("test_top1", "top1").replace("train_top1,", "top5,"))
    assert recorded(out)["validation"] == 0
    read = read_record(out)
    assert (read.measured, read.accuracies, read.counts) == ("test", ["top1", "top1_ema", "top5"], {"test": 36})
    assert read.parts == ["ce"]
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "of 36 test images; the average of the weights" in page
