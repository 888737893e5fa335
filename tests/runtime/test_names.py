"""Names of images, layers and classes that hold what no line of UTF-8 holds are written and read back."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.probing.stored_features import read_stored
from cka_probe.runtime.names import name_bytes, quoted, readable, unquoted

ODD = (
    b"x\xff.png", b"two\nlines.png", b"tab\t.png", b"\x1b[31mred.png", b"cr\r.png", b'"quoted".png', b"back\\slash.png",
    b'comma,".png', "ünï😀.png".encode(), b"\xe2\x80\xa8.png", b" blank .png", b"$x_1$.png",
)  # fmt: skip


class Odd(nn.Module):
    """Layers with names that no file holds as they are."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in (("a\udcff", nn.Conv2d(3, 4, 3)), ("b\nc", nn.ReLU()), ('"d', nn.Flatten())):
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    for name in ODD:
        with (root / os.fsdecode(name)).open("wb") as file:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return root


@pytest.mark.parametrize("name", [*map(os.fsdecode, ODD), "", "\ud800", '"', '"1"', "plain/a.png"], ids=ascii)
def test_a_quoted_name_is_one_line_of_utf_8_that_reads_back(name: str) -> None:
    line = quoted(name)
    assert line.encode().decode().splitlines() in ([line], [])
    assert unquoted(line) == name
    assert readable(name).encode().decode().isprintable()


def test_ordinary_names_are_lines_and_bytes_as_they_are() -> None:
    for name in ("a/b.png", "ümläut/日本 1.png", "back\\slash.png", "$x_1$, y.png"):
        assert quoted(name) == readable(name) == unquoted(name) == name
        assert name_bytes(name) == name.encode()
    assert unquoted('"an old name.png') == '"an old name.png'


def test_features_of_images_with_odd_names_are_kept_and_compared_again(images: Path, tmp_path: Path) -> None:
    cp.extract({"odd": Odd()}, tmp_path / "f", data=images, layers="all", image_size=8, batch_size=6, workers=0)
    (stored,) = read_stored(str(tmp_path / "f"))
    assert stored.samples is not None
    assert sorted(map(os.fsencode, stored.samples)) == sorted(ODD)
    assert list(stored.layers) == ["a\udcff", "b\nc", '"d']
    recorded = yaml.safe_load((tmp_path / "f" / "run.yaml").read_text(encoding="utf-8"))["result"]["data"]
    assert recorded["sample_sha256"] == hashlib.sha256((tmp_path / "f" / "samples.txt").read_bytes()).hexdigest()
    assert cp.compare([tmp_path / "f"], batch_size=12).provenance.data.examples == len(ODD)


@pytest.mark.slow
def test_a_comparison_of_images_with_odd_names_is_written_whole(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--layers", "stages", "--batch-size", "6", "--workers", "0", "--influence", "12", "--view", "noise:0.1"]
    assert main(["compare", "zoo:cnn", "--data", str(images), *options, "--out", str(out)]) == 0
    with (out / "influence.csv").open(encoding="utf-8", newline="") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    as_codes = (os.fsdecode(name).encode(errors="backslashreplace").decode().replace("\r", r"\r") for name in ODD)
    assert names == set(as_codes)
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert json.loads(re.findall(r'<script id="figures" type="application/json">(.*?)</script>', page)[0])


def test_tables_hold_valid_utf_8() -> None:
    """As pandas needs it where PyArrow is installed."""
    layers = tuple(cp.Layer("m\udcff", name) for name in ("a\udcff", "b"))
    frame = cp.Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers).to_frame()
    assert list(frame["row_layer"]) == ["a\\udcff", "a\\udcff", "b", "b"]
    assert set(frame["col_model"]) == {"m\\udcff"}


@pytest.mark.slow
def test_layers_and_models_with_odd_names_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = tuple(cp.Layer(model, name) for model in ("m\udcff", "n\n") for name in ("a\udcff", "b\x1b[0m", "$c$"))
    values = np.corrcoef(rng.normal(size=(6, 9)))
    similarity = cp.Similarity(values, values * 0, values * 0, layers, layers)
    from cka_probe.reports.report import draw
    from cka_probe.reports.run_files import Run

    draw(tmp_path, Run({"cka": similarity}, {"command": "x\udcff"}, {}))
    assert r"m\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "heatmap.svg").stat().st_size
    similarity.save(tmp_path / "s.npz")
    assert cp.Similarity.load(tmp_path / "s.npz").rows == layers
