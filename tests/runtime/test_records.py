"""Records of runs that are damaged are refused in one line that names the file, before anything is drawn."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cka_probe.cli.main import main
from cka_probe.errors import OutputError
from cka_probe.reports.report import report_page
from cka_probe.reports.run_files import read_comparison
from cka_probe.runtime.records import Shape, misfit, read_mapping

pytestmark = pytest.mark.slow

ODD: list[Any] = [
    None, [], {}, [1], [None], "x", "", 5, -1, 0, True, float("nan"), float("inf"), 1.5, {"a": 1}, [[1]], 10**25,
    [{"name": 3}], "a\nb", {"x": {"y": []}}, [["a", "b"]],
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    quick = ["--layers", "stages", "--examples", "32", "--batch-size", "16", "--workers", "0", "--measures", "cka,mmd"]
    assert main(["compare", "zoo:cnn", *quick, "--view", "identity,gray", "--curve", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", "result: [1]\ncommand: x"),
        ("run.yaml", "result: {measures: null}\ncommand: [x]"),
        ("run.yaml", "panels: 5"),
        ("run.yaml", "panels: {pairs: 3}"),
        ("run.yaml", "panels: {pairs: []}"),
        ("run.yaml", "panels: {pairs: [[a]]}"),
        ("run.yaml", "panels: {pairs: [[nobody, 'zoo:cnn [gray]']]}"),
        ("run.yaml", "panels: {pairs: [['zoo:cnn [gray]', 'zoo:cnn [gray]']], columns: -1}"),
        ("run.yaml", "[" * 5000),
        ("run.yaml", "- 1"),
        ("run.yaml", ""),
        ("run.yaml", "a: 2001-99-99"),
        ("run.yaml", "a: 2001-01-01"),
        ("run.yaml", "a: !!python/object:os.system {}"),
        ("run.yaml", "1: 2"),
        ("run.yaml", "? [a]\n: b"),
        ("run.yaml", "a: &a [*a]"),
        ("run.yaml", "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
        )),
        ("run.yaml", "a: 0x" + "f" * 5000),
        ("run.yaml", b"\xff\xfe\x00"),
        ("similarity.npz", b"PK"),
        ("similarity.mmd.npz", b""),
        ("samples.png", b"no image"),
        ("samples.png", (100, 192)),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(
    run: Path, tmp_path: Path, name: str, content: str | bytes | tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    if isinstance(content, tuple):
        Image.new("RGB", content).save(out / name)
    else:
        (out / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["report", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(out / name) in error
    assert error.count("\n") == 1


def test_a_measure_of_other_layers_is_not_drawn_beside_the_first(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run / "similarity.npz", tmp_path / "run" / "similarity.mmd.npz")
    with pytest.raises(OutputError, match=r"similarity\.mmd\.npz must hold another measure of the layers in"):
        read_comparison(tmp_path / "run")


def test_a_record_that_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(OutputError, match=r"run\.yaml cannot be read: it is a named pipe"):
        read_mapping(tmp_path / "run.yaml")


@pytest.mark.full
def test_whatever_a_record_holds_is_drawn_or_refused(run: Path, tmp_path: Path) -> None:
    """Values of all kinds at random places of run.yaml and of the provenance: none leads to a traceback."""
    rng, out = random.Random(0), tmp_path / "run"
    shutil.copytree(run, out)
    with np.load(run / "similarity.npz") as file:
        arrays = {name: file[name] for name in file.files}
    record, labels = yaml.safe_load((run / "run.yaml").read_text()), json.loads(str(arrays["labels"]))
    refused = 0
    for _ in range(60):
        changed, provenance = copy.deepcopy(record), copy.deepcopy(labels)
        _spoil(changed if rng.random() < 0.3 else provenance, rng)
        (out / "run.yaml").write_text(yaml.safe_dump(changed))
        np.savez(out / "similarity.npz", **{**arrays, "labels": np.array(json.dumps(provenance))})
        try:
            found = read_comparison(out)
        except OutputError as error:
            refused += 1
            _assert_names(error, out)
            continue
        assert report_page(found)
    assert 10 < refused < 50


def _assert_names(error: OutputError, out: Path) -> None:
    assert str(out) in str(error)
    assert "\n" not in str(error)


def _spoil(record: Any, rng: random.Random) -> None:
    """Put something odd at a random place of a record, or take it away."""
    *path, last = rng.choice(list(_places(record)))
    for key in path:
        record = record[key]
    if rng.random() < 0.3 and isinstance(record, dict):
        del record[last]
    else:
        record[last] = copy.deepcopy(rng.choice(ODD))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from _places(item, (*path, key))


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        (3, int, ""),
        (True, int, "x must be int, but is 'True'"),
        (True, bool, ""),
        (3, float, ""),
        (float("nan"), float, "x must be float, but is 'nan'"),
        ("a", (int, None), "x must be int, but is 'a'"),
        (None, (int, None), ""),
        ([1, 2], [int], ""),
        ([1, "2"], [int], "x[1] must be int, but is '2'"),
        ([1], [int, int], "x must hold 2 values, but holds 1"),
        ("ab", [str], "x must be a list, but is str"),
        ({"a": 1, "c": None}, {"a": int, "b?": int}, ""),
        ({"b": 1}, {"a": int}, "x has no 'a'"),
        ({"a": 1, "b": "x"}, {"a": int, "b?": int}, "x.b must be int, but is 'x'"),
        ({"k": 1, "l": []}, {str: int}, "x.l must be int, but is '[]'"),
        (3, {}, "x must be a mapping, but is int"),
        (object(), object, ""),
    ],
)
def test_a_value_has_a_shape_or_a_reason(value: Any, shape: Shape, wrong: str) -> None:
    assert misfit(value, shape, "x") == wrong
