"""A report of results that a notebook holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cka_probe as cp
from cka_probe.errors import OutputError, SpecError
from cka_probe.reports.run_files import read_comparison


def results(seed: int = 0, **options: object) -> dict[str, cp.Similarity]:
    rng = np.random.default_rng(seed)
    features = {name: rng.normal(size=(40, 6)) for name in ("x", "y")}
    return cp.compare(features, measures=["cka", "rsa"], batch_size=20, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_holds_what_the_command_writes(tmp_path: Path) -> None:
    found = results(curve=True)
    page = cp.write_report(found, tmp_path / "out")
    assert page.read_text().startswith("<!")
    assert {path.name for path in page.parent.iterdir()} >= {"heatmap.png", "similarity.csv", "curve.csv", "run.yaml"}
    again = read_comparison(page.parent).results
    assert list(again) == ["cka", "rsa"]
    np.testing.assert_array_equal(again["rsa"].values, found["rsa"].values)


@pytest.mark.slow
def test_files_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    single = results()["cka"]
    with pytest.raises(OutputError, match=r"notes\.txt"):
        cp.write_report(single, tmp_path)
    out = tmp_path / "out"
    cp.write_report(single, out)
    (out / "mine.txt").write_text("mine")
    cp.write_report([single], out, overwrite=True)
    assert (out / "mine.txt").read_text() == "mine"


def test_results_must_belong_together(tmp_path: Path) -> None:
    found = results()
    with pytest.raises(SpecError, match="at least one"):
        cp.write_report([], tmp_path)
    with pytest.raises(SpecError, match="may appear once"):
        cp.write_report([found["cka"], found["cka"]], tmp_path)
    other = cp.compare({"z": np.random.default_rng(1).normal(size=(40, 6)), "x": np.eye(40)}, measures="rsa")
    with pytest.raises(SpecError, match="same layers"):
        cp.write_report([found["cka"], other], tmp_path)
    assert not list(tmp_path.iterdir())
