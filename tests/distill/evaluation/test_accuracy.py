"""evaluate: which images, how classes are matched, confusion matrix, tables and files, and what is refused."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.evaluation.accuracy import evaluate, evaluate_networks
from cka_probe.distill.evaluation.class_matching import Matching, label_names, matched_classes
from cka_probe.distill.evaluation.images import EvaluatedImages, evaluated_images
from cka_probe.distill.evaluation.score import Score
from cka_probe.distill.options import Evaluation
from cka_probe.errors import DataError, NetworkError, SpecError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.sources.source import open_source
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World
from tests.distill.conftest import spec
from tests.folders import names

CPU = World(torch.device("cpu"))
ASKED: dict[str, Any] = {"device": "cpu", "workers": 0, "image_size": 8}


class Brightness(nn.Module):
    """Says class 0 of black images, the last class of white ones, and those between in their order.

    Its logits may stand in another order, with names; one of them may have another value for all images.
    """

    def __init__(
        self, classes: int = 3, order: Sequence[int] = (), label_names: Any = None, odd: tuple[int, float] | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("levels", torch.linspace(0, 1, classes), persistent=False)
        self.order, self.odd = list(order) or list(range(classes)), odd
        self.pretrained_cfg = {
            "input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3, "label_names": label_names
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits = -(x.mean((1, 2, 3))[:, None] - self.levels).abs()[:, self.order]
        if self.odd is not None:
            logits[:, self.odd[0]] = self.odd[1]
        return logits + self.weight


def network(tmp_path: Path, name: str = "net", **options: Any) -> str:
    """The spec of such a network."""
    file = tmp_path / f"{name}.py"
    said = ", ".join(f"{key}={value!r}" for key, value in options.items()).replace("inf", "float('inf')")
    said = said.replace("nan", "float('nan')")
    file.write_text(
        f"from tests.distill.evaluation.test_accuracy import Brightness\ndef {name}(): return Brightness({said})\n"
    )
    return f"{file}:{name}"


def write(folder: Path, level: int, count: int = 1, mode: str = "RGB") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((8, 8), level, dtype=np.uint16 if mode == "I;16" else np.uint8)
        image = Image.fromarray(pixels)
        (image if mode == "I;16" else image.convert(mode)).save(folder / f"{number}-{level}.png")


@pytest.fixture
def grays(tmp_path: Path) -> Path:
    """Class folders of black, gray and white images, 3, 5 and 4; one of those that should be gray is white."""
    root = tmp_path / "grays"
    for name, level, count in (("black", 0, 3), ("gray", 128, 4), ("gray", 250, 1), ("white", 255, 4)):
        write(root / name, level, count)
    return root


def test_all_images_of_class_folders_are_measured(grays: Path, tmp_path: Path) -> None:
    score = evaluate(network(tmp_path), data=str(grays), **ASKED)
    assert (score.accuracy.images, score.images.part) == (12, "all images")
    assert score.top1 == 11 / 12
    np.testing.assert_array_equal(score.confusion, [[3, 0, 0], [0, 4, 1], [0, 0, 4]])
    np.testing.assert_array_equal(score.confusion, confusion_matrix(score.labels, score.predicted))
    assert [one.top1 for one in score.by_class()] == [1, 4 / 5, 1]


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        (("train", "val", "test"), "test"),
        (("training", "valid"), "valid"),
        (("train", "test"), "test"),
        (("train",), "train"),
        (("val",), "val"),
    ],
)
def test_of_a_folder_with_parts_the_test_part_is_measured(parts: Sequence[str], part: str, tmp_path: Path) -> None:
    for number, name in enumerate(parts, 1):
        for label in ("a", "b"):
            write(tmp_path / "data" / name / label, 0, number)
    found = evaluated_images(["zoo:cnn"], Evaluation(data=str(tmp_path / "data")), CPU)
    assert (found.part, len(found.images)) == (part, 2 * (1 + parts.index(part)))


def test_classes_may_be_called_like_parts(tmp_path: Path) -> None:
    for name in ("bus", "train", "test"):
        write(tmp_path / "data" / name, 0, 2)
    found = evaluated_images(["zoo:cnn"], Evaluation(data=str(tmp_path / "data")), CPU)
    assert (found.classes, len(found.images), found.part) == (("bus", "test", "train"), 6, "all images")


def test_labels_are_those_of_the_training_part(tmp_path: Path) -> None:
    for name in ("black", "gray", "white"):
        write(tmp_path / "data" / "train" / name, 0)
    write(tmp_path / "data" / "test" / "white", 255, 2)
    score = evaluate(network(tmp_path), data=str(tmp_path / "data"), **ASKED)
    assert score.labels.tolist() == [2, 2]
    assert score.top1 == 1
    assert [one.images for one in score.by_class()] == [0, 0, 2]
    write(tmp_path / "data" / "test" / "pink", 255)
    with pytest.raises(DataError, match="no other class folders than .*train, but holds pink too"):
        evaluate(network(tmp_path), data=str(tmp_path / "data"), **ASKED)


@pytest.mark.slow
def test_a_student_is_measured_on_the_test_images_of_its_run(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(colours / "train", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    asked = ["--data", "data", "--workers", "0"]
    student = f"s={spec('tiny_cnn')}"
    assert main(["distill", "--method", "none", "--student", student, "--epochs", "1", "--batch-size", "12",
                 "--out", "run", *asked]) == 0  # fmt: skip
    own = yaml.safe_load(Path("run/run.yaml").read_text())["result"]
    weights = f"{student}@run/student.safetensors"
    found = evaluate_networks([weights, spec("teacher")], Evaluation(data=str(tmp_path / "data"), workers=0), CPU)
    assert [score.accuracy.images for score in found] == [own["images"]["test"]] * 2
    assert found[0].top1 == own["top1"]
    shutil.copytree("data", "other")
    (other,) = evaluate_networks([weights], Evaluation(data="other", workers=0), CPU)
    (teacher,) = evaluate_networks([spec("teacher")], Evaluation(data="data", workers=0), CPU)
    assert other.accuracy.images == teacher.accuracy.images == 72
    capsys.readouterr()
    assert main(["evaluate", weights, *asked]) == 0
    assert "(test images of run)" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "other")  # the record says "data", as seen from the folder above the run
    weights = weights.replace("@run", f"@{tmp_path}/run")
    (moved,) = evaluate_networks([weights], Evaluation(data="../data", workers=0), CPU)
    assert moved.accuracy.images == own["images"]["test"]


@pytest.mark.parametrize(
    ("own", "data", "count", "logits", "how"),
    [
        (None, ["a", "b"], 2, (0, 1), "by order"),
        (["b", "a"], ["a", "b"], 2, (1, 0), "by name"),
        (["c", "b", "a"], ["a", "b"], 3, (2, 1), "by name, 2 of the network's 3"),
        (["0", "1"], ["a", "b"], 2, (0, 1), "by order"),
        (["a", "b"], ["0", "1"], 2, (0, 1), "by order"),
        (["0", "10", "2"], ["0", "2", "10"], 3, (0, 2, 1), "by name"),
        (["a", "a"], ["a", "b"], 2, (0, 1), "by order"),
        (["a"], ["a", "b"], 2, (0, 1), "by order"),
    ],
)
def test_classes_are_matched_by_name_or_else_by_order(
    own: list[str] | None, data: list[str], count: int, logits: tuple[int, ...], how: str
) -> None:
    assert matched_classes(own, data, count, "net") == Matching(logits, how)


@pytest.mark.parametrize(
    ("own", "count", "said"),
    [
        (None, 3, "must have the data's 2 classes, but 'net' has 3"),
        (["a", "c", "d"], 3, "has 3. It has no 'b'; its classes are 'a', 'c', 'd'"),
        (["a", "c"], 2, "names that 'net' was trained with. It has no 'b'; .* Rename the class folders"),
    ],
)
def test_other_classes_are_refused(own: list[str] | None, count: int, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        matched_classes(own, ["a", "b"], count, "net")


@pytest.mark.parametrize("names", [["white", "black", "gray"], {"0": "white", "1": "black", "2": "gray"}])
def test_names_of_the_network_decide(names: Any, grays: Path, tmp_path: Path) -> None:
    subject = Subject("net", Brightness(label_names=names), Preprocessing())
    assert label_names(subject) == ("white", "black", "gray")
    score = evaluate(network(tmp_path, order=(2, 0, 1), label_names=names), data=str(grays), **ASKED)
    assert score.matched == "by name"
    np.testing.assert_array_equal(score.confusion, [[3, 0, 0], [0, 4, 1], [0, 0, 4]])


def test_a_prediction_outside_the_classes_of_the_data_has_a_column_of_its_own(grays: Path, tmp_path: Path) -> None:
    shutil.rmtree(grays / "white")
    score = evaluate(network(tmp_path, label_names=["black", "gray", "white"]), data=str(grays), **ASKED)
    np.testing.assert_array_equal(score.confusion, [[3, 0, 0], [0, 4, 1]])
    assert score.top1 == 7 / 8


@pytest.mark.parametrize(
    ("odd", "said"),
    [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")],
)
def test_logits_that_are_not_finite_are_refused(odd: float, said: str, grays: Path, tmp_path: Path) -> None:
    net = network(tmp_path, odd=(1, odd))
    with pytest.raises(
        NetworkError, match=f"'net' must be finite numbers, but those of 12 of the 12 images hold {said}"
    ):
        evaluate(net, data=str(grays), **ASKED)


def test_two_classes_one_image_each_and_16_bits(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a", 0, mode="I;16")
    write(tmp_path / "data" / "b", 65535, mode="I;16")
    score = evaluate(network(tmp_path, classes=2), data=str(tmp_path / "data"), **ASKED)
    np.testing.assert_array_equal(score.confusion, np.eye(2))
    assert not score.has_top5
    shutil.rmtree(tmp_path / "data" / "b")
    with pytest.raises(DataError, match="at least 2 classes, but holds 1"):
        evaluate(network(tmp_path, classes=2), data=str(tmp_path / "data"), **ASKED)


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data: Any = [(Image.new("RGB", (8, 8)), label) for label in (0, 1, 2)]
    images = EvaluatedImages(open_source(data), ("a", "b"), "test")
    monkeypatch.setattr("cka_probe.distill.evaluation.images.evaluated_images", lambda *_: images)
    with pytest.raises(DataError, match="from 0 to 1, as there are 2 classes, but one is 2"):
        evaluate(network(tmp_path, classes=2), **ASKED)


def evaluated(*arguments: str, data: Path) -> int:
    return main(["evaluate", *arguments, "--data", str(data), "--workers", "0", "--image-size", "8"])


def test_several_networks_stand_in_one_table(grays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = network(tmp_path, label_names=["black", "gray", "white"])
    bad = network(tmp_path, "swapped", order=(2, 1, 0))
    assert evaluated(good, bad, data=grays) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Data {grays} (all images)"
    assert [line.split() for line in lines[1:4]] == [
        ["Network", "Top-1", "95%", "interval", "Images"],
        ["net", "91.67%", "64.61%", "to", "98.51%", "12"],
        ["swapped", "33.33%", "13.81%", "to", "60.94%", "12"],
    ]
    assert lines[4].startswith("net: input 8 × 8 px, RGB, ")
    assert lines[4].endswith("; 3 classes, matched by name")
    assert lines[5].endswith("; 3 classes, matched by order")
    assert evaluated(good, good, data=grays) == 2
    assert "would both be called 'net'" in capsys.readouterr().err


def test_the_network_that_fails_is_named_and_the_others_are_printed(
    grays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(network(tmp_path), network(tmp_path, "odd", odd=(1, np.nan)), data=grays) == 2
    output = capsys.readouterr()
    assert "net 91.67%" in " ".join(output.out.split())
    assert "The logits of 'odd' must be finite" in output.err


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_accuracy_by_class_and_confusion_matrix_are_written(
    grays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluated(network(tmp_path), "--per-class", "--out", str(out), data=grays) == 0
    assert names(out) == {"accuracy.csv", "per-class.csv", "confusion.csv", "confusion.png", "run.yaml"}
    assert "  gray: 80.00% (4 of 5; 1 as white)" in capsys.readouterr().out.splitlines()
    assert [row["accuracy"] for row in rows(out / "per-class.csv")] == ["1.0", "0.8", "1.0"]
    matrix = rows(out / "confusion.csv")
    assert [[int(row[name]) for name in ("black", "gray", "white")] for row in matrix] == [
        [3, 0, 0], [0, 4, 1], [0, 0, 4]
    ]  # fmt: skip
    (row,) = rows(out / "accuracy.csv")
    assert (row["top1"], row["images"], "top5" in row) == (str(11 / 12), "12", False)
    result = yaml.safe_load((out / "run.yaml").read_text())["result"]
    assert result["data"] == {"source": str(grays), "part": "all images", "images": 12, "classes": 3}
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 300
    both = [network(tmp_path), network(tmp_path, "other")]
    assert evaluated(*both, "--per-class", "--out", str(tmp_path / "two"), data=grays) == 0
    assert {"confusion.net.csv", "confusion.other.png"} <= names(tmp_path / "two")


def test_files_of_others_are_kept(grays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, out = network(tmp_path), tmp_path / "out"
    assert evaluated(net, "--per-class", data=grays) == 2
    assert "--per-class writes files. Name a folder for them: --out DIR" in capsys.readouterr().err
    out.mkdir()
    (out / "confusion.png").write_text("mine")
    for flags in ([], ["--overwrite"]):
        assert evaluated(net, "--per-class", "--out", str(out), *flags, data=grays) == 2
        assert (out / "confusion.png").read_text() == "mine"
    assert evaluated(net, "--out", str(tmp_path / "new"), data=grays) == 0
    assert evaluated(net, "--out", str(tmp_path / "new"), data=grays) == 2
    assert evaluated(net, "--out", str(tmp_path / "new"), "--overwrite", data=grays) == 0


def test_broken_images_are_left_out_and_listed(grays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grays / "gray" / "0-250.png").write_bytes(b"no image")
    net, out = network(tmp_path), tmp_path / "out"
    assert evaluated(net, data=grays) == 2
    assert "0-250.png must be an image" in capsys.readouterr().err
    assert evaluated(net, "--skip-broken", "--out", str(out), data=grays) == 0
    said = capsys.readouterr().out
    assert "Top-1 100.00%" in said
    assert "Images 11" in said.splitlines()
    assert "Broken 1 image could not be read: " in said
    (broken,) = yaml.safe_load((out / "run.yaml").read_text())["result"]["data"]["broken"]
    assert broken["image"] == str(grays / "gray" / "0-250.png")


@pytest.mark.slow
def test_a_picture_of_many_classes_has_no_numbers_but_names() -> None:
    from cka_probe.distill.evaluation.confusion import plot_confusion
    from cka_probe.distill.evaluation.score import Accuracy

    labels = np.repeat(np.arange(100), 3)
    score = Score(
        "net", Accuracy(300, 1.0, 1.0), labels, labels, tuple(f"class {n}" for n in range(100)), "by name",
        None, Preprocessing(), {},  # type: ignore[arg-type]
    )  # fmt: skip
    axes = plot_confusion(score)
    assert not axes.texts
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {n}" for n in range(100)]


@pytest.mark.slow
def test_a_subject_is_evaluated_as_its_spec_is() -> None:
    options = {"data": "digits", "device": "cpu", "workers": 0}
    assert cp.evaluate(cp.load_subject("zoo:mlp"), **options).accuracy == cp.evaluate("zoo:mlp", **options).accuracy
