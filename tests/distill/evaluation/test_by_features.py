"""Nearest neighbours, linear probe and episodes on frozen features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.evaluation.frozen_features import Features, feature_layer, features_of
from cka_probe.distill.evaluation.probes import few_shot, linear_probe, nearest_neighbours
from cka_probe.distill.options import Evaluation
from cka_probe.distill.subjects import examine, load
from cka_probe.errors import DataError
from cka_probe.images.parts import open_parts
from cka_probe.runtime.world import World

CPU = World(torch.device("cpu"))


def drawn(count: int, seed: int, classes: int = 4, spread: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centers = np.random.default_rng(9).normal(size=(classes, 6))
    return Features((3 * centers[labels] + spread * rng.normal(size=(count, 6))).astype(np.float32), labels)


def test_nearest_neighbours_are_those_by_cosine() -> None:
    known, asked = drawn(60, 0, spread=3), drawn(25, 1, spread=3)
    for neighbours in (1, 7):
        predicted = nearest_neighbours(known, asked, neighbours)
        for value, found in zip(asked.values, predicted, strict=True):
            cosines = [float(value @ other / np.linalg.norm(value) / np.linalg.norm(other)) for other in known.values]
            nearest = known.labels[np.argsort(cosines)[-neighbours:]]
            votes = np.bincount(nearest, minlength=4)
            assert votes[found] == votes.max()
    scaled = Features(known.values * np.linspace(1, 50, 60, dtype=np.float32)[:, None], known.labels)
    assert np.array_equal(nearest_neighbours(scaled, asked, 7), nearest_neighbours(known, asked, 7))
    assert len(nearest_neighbours(known, asked, 1000)) == 25, "all of the known images vote where they are fewer"


def test_a_linear_probe_does_not_see_the_scale_of_a_feature() -> None:
    known, asked = drawn(80, 0), drawn(40, 1)
    predicted = linear_probe(known, asked)
    assert (predicted == asked.labels).mean() > 0.9
    scale = np.array([1, 10, 100, 1, 0.1, 1], dtype=np.float32)
    changed = linear_probe(Features(known.values * scale, known.labels), Features(asked.values * scale, asked.labels))
    assert np.array_equal(changed, predicted)
    with pytest.raises(DataError, match="2 classes or more"):
        linear_probe(Features(known.values, np.zeros(80, np.int64)), asked)


def test_episodes_are_those_of_a_naive_loop() -> None:
    features = drawn(40, 0, spread=4)
    found = few_shot(features, ways=3, shots=2, episodes=5, seed=7)
    rng = np.random.default_rng(7)
    unit = features.values.astype(float) / np.linalg.norm(features.values.astype(float), axis=1, keepdims=True)
    for episode in range(5):
        ways = rng.choice(np.arange(4), 3, replace=False)
        assert np.array_equal(found.labels[episode], ways)
        picked = [rng.choice(np.flatnonzero(features.labels == way), 3, replace=False) for way in ways]
        for place, rows in enumerate(picked):
            cosines = []
            for others in picked:
                mean = unit[others[1:]].mean(0)
                cosines.append(unit[rows[0]] @ mean / np.linalg.norm(mean))
            assert found.predicted[episode, place] == ways[int(np.argmax(cosines))]


def test_episodes_take_all_classes_that_have_images_enough() -> None:
    features = drawn(60, 0)
    labels = features.labels.copy()
    labels[np.flatnonzero(labels == 3)[2:]] = 0  # two images of class 3 are left
    found = few_shot(Features(features.values, labels), ways=50, shots=2, episodes=3, seed=0)
    assert found.labels.shape == (3, 3)
    with pytest.raises(DataError, match="2 classes or more with 101 images each, but 0"):
        few_shot(features, ways=50, shots=100, episodes=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "name"),
    [("zoo:cnn", "global_pool"), ("zoo:vit", "head_drop"), ("resnet18,num_classes=0@random", "")],
)
def test_features_are_what_the_classifier_gets(spec: str, name: str) -> None:
    examined = examine(load(spec, "Network", 32), "stages", CPU.device)
    layer = feature_layer(examined.side)
    assert layer.name == name
    if not name:
        return
    images = open_parts("digits").test
    features = features_of(examined.subject, layer, images, CPU, Evaluation(batch_size=100, workers=0))
    got: list[torch.Tensor] = []
    network = examined.subject.network
    head: nn.Module = network.get_classifier()  # type: ignore[operator,assignment]
    head.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    transform = examined.subject.preprocessing.transform()
    with torch.no_grad():
        network.eval()(torch.stack([transform(images.read(index)[0]) for index in range(5)]))  # type: ignore[arg-type]
    np.testing.assert_allclose(features.values[:5], got[0].numpy(), atol=1e-5)
    assert features.labels[:5].tolist() == [images.read(index)[1] for index in range(5)]


def test_a_network_without_a_linear_classifier_gives_its_last_stage() -> None:
    examined = examine(load("deit_tiny_distilled_patch16_224,img_size=32@random", "Network", 32), "stages", CPU.device)
    assert feature_layer(examined.side).name == "blocks.11", "two classifiers, whose mean is the output"


@pytest.mark.slow
def test_evaluate_by_features(colours: Path) -> None:
    known = cp.evaluate("zoo:cnn", by="knn", workers=0, device="cpu")
    assert known.top1 > 0.98
    assert (known.accuracy.images, known.has_top5, known.by) == (359, False, "knn")
    assert known.confusion.sum() == 359
    episodes = cp.evaluate("zoo:cnn", by="fewshot", shots=1, episodes=20, workers=0, device="cpu")
    low, high = episodes.accuracy.interval()
    assert low < episodes.top1 < high
    assert len(episodes.accuracy.episodes) == 20
    linear = cp.evaluate("zoo:cnn", data=str(colours), by="linear", workers=0, device="cpu")
    assert (linear.top1, linear.images.part) == (1, "test"), "36 images of val, by 72 of train"
    assert linear.accuracy.images == 36


def test_a_folder_without_parts_is_divided_for_what_learns(image_folder: Path) -> None:
    score = cp.evaluate("zoo:cnn", data=str(image_folder), by="knn", neighbours=1, workers=0, device="cpu")
    assert score.accuracy.images == 1, "a tenth of twelve"
    episodes = cp.evaluate("zoo:cnn", data=str(image_folder), by="fewshot", episodes=4, workers=0, device="cpu")
    assert episodes.images.part == "all images"


@pytest.mark.slow
def test_the_command_says_how(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--by", "knn", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["evaluate", "zoo:cnn", *options, "--per-class"]) == 0
    shown = capsys.readouterr().out
    assert "named by 20 nearest neighbours among 1,438 training images (global_pool, 48 features)" in shown
    assert "Top-5" not in shown
    assert ",knn," in (tmp_path / "out" / "accuracy.csv").read_text()
    with pytest.raises(SystemExit):
        main(["evaluate", "zoo:cnn", "--by", "guess"])
    assert main(["evaluate", "zoo:cnn", "--by", "fewshot", "--ways", "1"]) == 2
    assert "--ways must be a whole number from 2" in capsys.readouterr().err
