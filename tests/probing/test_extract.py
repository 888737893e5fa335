"""Extracted features are those of the network, and compare as it does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.errors import DataError, FeatureError, OutputError, SpecError
from cka_probe.probing.compare import list_layers
from cka_probe.probing.feature_files import FeatureFile, mapped
from tests.folders import files_below, names

QUICK = {"examples": 70, "batch_size": 32, "layers": "stages", "device": "cpu"}  # the last batch holds 6


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "out"
    assert cp.extract(["zoo:cnn", "zoo:vit"], out, **QUICK) == [
        out / "zoo_cnn.safetensors",
        out / "zoo_vit.safetensors",
    ]
    return out


def array(n: int = 40, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_the_files_hold_the_pooled_activations_for_any_safetensors_reader(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.flat = nn.Conv2d(3, 4, 3), nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(self.map(x))

    network, images = Two(), torch.randn(22, 3, 6, 6)
    (file,) = cp.extract({"net": network}, tmp_path / "out", data=TensorDataset(images), layers="all", batch_size=8)
    order = np.random.default_rng(0).permutation(22)
    with torch.no_grad():
        maps = network.map(images[order])
    found = safetensors.numpy.load_file(file)
    assert {key: (value.shape, value.dtype.name) for key, value in found.items()} == {
        "map": ((22, 4), "float32"),
        "flat": ((22, 64), "float32"),
    }
    np.testing.assert_allclose(found["map"], maps.mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(found["flat"], maps.flatten(1), atol=1e-6)
    names = (tmp_path / "out" / "samples.txt").read_text()
    assert names.split("\n") == [f"TensorDataset/{index}" for index in order]


def test_the_record_tells_options_data_and_the_hash_of_the_samples_file(features: Path) -> None:
    record = yaml.safe_load((features / "run.yaml").read_text())["result"]
    assert record["data"]["sample_sha256"] == hashlib.sha256((features / "samples.txt").read_bytes()).hexdigest()
    assert (record["pool"], record["seed"], record["data"]["examples"]) == ("mean", 0, 70)
    assert [subject["file"] for subject in record["subjects"]] == ["zoo_cnn.safetensors", "zoo_vit.safetensors"]
    with safe_open(features / "zoo_cnn.safetensors", "np") as file:
        assert file.metadata()["sample_sha256"] == record["data"]["sample_sha256"]


@pytest.mark.slow
def test_extracted_features_compare_as_their_networks_do(features: Path) -> None:
    live = cp.compare(["zoo:cnn", "zoo:vit"], pool="mean", **QUICK)
    both = cp.compare([str(features), "zoo:mlp"], pool="mean", **QUICK)
    assert both.models == ("zoo:cnn", "zoo:vit", "zoo:mlp")
    np.testing.assert_allclose(both.values[:8, :8], live.values, atol=1e-6)  # the same batches
    alone = cp.compare([features], examples=70, batch_size=70)
    assert alone.provenance.pool == "mean"
    assert alone.provenance.data.source == "digits"
    one_batch = cp.compare(["zoo:cnn", "zoo:vit"], pool="mean", examples=70, batch_size=70, layers="stages")
    np.testing.assert_allclose(alone.values, one_batch.values, atol=1e-6)  # one batch, in another order


def test_one_subject_of_a_folder_may_be_named_and_its_layers_chosen(features: Path) -> None:
    sim = cp.compare([f"mine={features}/zoo_vit.safetensors", "zoo:cnn"], **{**QUICK, "layers": "blocks.7,layer4"})
    assert [str(layer) for layer in sim.rows] == ["mine blocks.7", "zoo:cnn layer4"]
    with pytest.raises(SpecError, match="No layer of 'zoo:cnn' matches 'blocks"):
        cp.compare([f"{features}/zoo_vit.safetensors", "zoo:cnn"], **{**QUICK, "layers": "blocks.7"})
    with pytest.raises(SpecError, match=r"cannot cover the 2 subjects.*mine=.*zoo_cnn\.safetensors"):
        cp.compare([f"mine={features}"])


def test_views_are_extracted_and_known_again(tmp_path: Path) -> None:
    cp.extract(["zoo:cnn"], tmp_path, views="identity,blur:1", overwrite=True, **QUICK)
    sim = cp.compare([tmp_path])
    assert sim.models == ("zoo:cnn [identity]", "zoo:cnn [blur:1]")
    assert sim.provenance.subjects[1].view.as_record() == {"name": "blur:1", "sigma": 1.0}


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
def test_arrays_from_elsewhere_give_the_function_s_number(tmp_path: Path, suffix: str) -> None:
    x, y = array(), array(seed=1) + array()
    for name, values in (("x", x), ("y", y)):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "npy":
            np.save(path, values)
        elif suffix == "npz":
            np.savez(path, features=values)
        else:
            safetensors.numpy.save_file({"features": values}, path)
    sim = cp.compare([tmp_path / f"x.{suffix}", f"other={tmp_path}/y.{suffix}"])
    assert [str(layer) for layer in sim.rows] == ["x features", "other features"]
    assert sim.values[0, 1] == pytest.approx(cp.linear_cka(x, y), abs=1e-12)  # float64 all the way
    given = cp.compare({"x": x, "y": torch.tensor(y)})
    np.testing.assert_allclose(given.values, sim.values, atol=1e-12)


def test_rows_come_in_a_seeded_random_order_so_that_sorted_files_do_not_mislead() -> None:
    x = np.repeat(np.eye(4), 25, axis=0) + 0.01 * array(100, 4)  # sorted by class
    batched = cp.compare({"x": x, "y": x + 0.01 * array(100, 4, 2)}, batch_size=25)
    assert batched.values[0, 1] > 0.95, "in the order of the file a batch would hold one class, and only its noise"


def test_what_cannot_stand_beside_each_other_is_refused(features: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array(70))
    for models, options, said in (
        ({"x": array(40), "y": array(41)}, {}, "'x' has 40 rows and 'y' 41"),
        ([features, "zoo:mlp"], {"examples": 70, "seed": 1}, "70 and 70, with .* in common"),
        ([features, "zoo:mlp"], {"examples": 100}, "100 and 70"),
        ([str(tmp_path / "x.npy"), "zoo:mlp"], {"examples": 70}, "does not record its examples"),
    ):
        with pytest.raises(DataError, match=said):
            cp.compare(models, **options)  # type: ignore[call-overload]
    with pytest.raises(SpecError, match="all models are stored features"):
        cp.compare([features], views="gray")
    with pytest.raises(SpecError, match="Layers are those of a network"):
        list_layers(features)
    with pytest.raises(SpecError, match="stored features already"):
        cp.extract([features], tmp_path / "again")
    other = tmp_path / "other"
    cp.extract(["mlp=zoo:mlp"], other, **{**QUICK, "seed": 1})
    with pytest.raises(DataError, match="hold 70 and 70"):
        cp.compare([features, other])


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("x.npy", None, SpecError, r"The features .*x\.npy do not exist"),
        ("x.npy", b"no array", DataError, "cannot be read"),
        ("x.npz", b"no archive", DataError, "cannot be read"),
        ("x.safetensors", b"\xff" * 20, DataError, "no safetensors file"),
        ("x.npy", np.zeros((3, 4, 5)), FeatureError, r"of shape \(3, 4, 5\)"),
        ("x.npy", np.array([["a", "b"]] * 5), FeatureError, "must be real numbers"),
        ("x.npy", np.zeros((5, 0)), FeatureError, r"of shape \(5, 0\)"),
    ],
)
def test_bad_files_say_what_they_must_hold(
    tmp_path: Path, name: str, content: object, error: type[Exception], said: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(error, match=said):
        cp.compare([tmp_path / name])


def test_features_that_are_not_finite_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    images = torch.zeros(8, 1, 2, 2)
    images[5] = float("nan")
    network = nn.Sequential(nn.Flatten())
    with pytest.raises(FeatureError, match="layer '0' of 'net' hold NaN"):
        cp.extract({"net": network}, tmp_path / "out", data=TensorDataset(images), layers="all")
    assert files_below(tmp_path) == []


def test_a_folder_is_overwritten_only_when_asked_and_only_what_was_extracted(features: Path, tmp_path: Path) -> None:
    cp.extract(["a=zoo:cnn"], tmp_path, examples=8, layers="stages")
    (tmp_path / "student.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="holds a finished run"):
        cp.extract(["b=zoo:cnn"], tmp_path, examples=8, layers="stages")
    cp.extract(["b=zoo:cnn"], tmp_path, examples=8, layers="stages", overwrite=True)
    assert names(tmp_path) == {
        "b.safetensors", "student.safetensors", "run.yaml", "samples.txt",
    }  # fmt: skip


def test_a_file_written_by_parts_reads_as_one_written_whole(tmp_path: Path) -> None:
    layers = {"a": np.float32(array(10, 3)), "b.é": np.float32(array(10, 7))}
    file = FeatureFile(tmp_path / "parts.safetensors", 10, {"a": 3, "b.é": 7}, {"k": "v"})
    for first in range(0, 10, 4):
        for name, values in layers.items():
            file.write(name, first, values[first : first + 4])
    file.close()
    whole = safetensors.numpy.load_file(tmp_path / "parts.safetensors")
    for found in (whole, mapped(tmp_path / "parts.safetensors")):
        assert found.keys() == layers.keys()
        for name, values in layers.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.slow
def test_names_that_a_file_system_would_not_like_or_confuse_get_files_of_their_own(tmp_path: Path) -> None:
    models = {"a/b [x]": "zoo:cnn", "a b x": "zoo:cnn", "A_b_x": "zoo:cnn"}
    files = cp.extract(models, tmp_path, examples=8, layers="stages")
    assert [file.name for file in files] == ["a_b_x.safetensors", "a_b_x-1.safetensors", "A_b_x-2.safetensors"]
    assert cp.compare([tmp_path]).models == tuple(models)


@pytest.mark.slow
def test_the_command_extracts_and_compares_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--examples", "32", "--batch-size", "16", "--layers", "stages"]
    assert main(["extract", "zoo:cnn", *quick, "--out", str(tmp_path / "f")]) == 0
    assert f"Features: {tmp_path / 'f' / 'zoo_cnn.safetensors'}" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", array(32))
    assert main(["compare", str(tmp_path / "f"), str(tmp_path / "x.npy"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stored features: <code>" in page
    assert not (tmp_path / "out" / "samples.png").exists()
    assert main(["report", str(tmp_path / "out")]) == 0
    assert main(["extract", "zoo:cnn", *quick, "--out", str(tmp_path / "f")]) == 2
    assert "holds a finished run" in capsys.readouterr().err
