"""The report of a distillation: drawn from the folder's files alone, whatever the method, finished or not."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cka_probe.cli.main import main
from cka_probe.distill.config import Training
from cka_probe.distill.outputs.record import Record, read_record
from cka_probe.distill.outputs.report import report_page
from cka_probe.results.similarity import Similarity
from tests.distill.conftest import spec
from tests.distill.training.test_train import killed_after
from tests.pages import figures_of, numbers

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
Options = Callable[..., Training]


def run(colours: Path, out: Path, *more: str) -> Path:
    base = ["--student", spec("tiny_vit"), "--data", str(colours), "--epochs", "3", "--batch-size", "12"]
    rest = ["--workers", "0", "--device", "cpu", "--probe-examples", "32", "--out", str(out)]
    assert main(["distill", *base, *rest, *more]) == 0
    return out


@pytest.fixture(scope="module")
def chosen(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OFA with stages that were chosen on the way."""
    out = tmp_path_factory.mktemp("ofa") / "out"
    more = ("--stages", "auto", "--rule", "aligned", "--ema", "0.5")
    return run(colours, out, "--method", "ofa", "--teacher", spec("teacher"), *more)


@pytest.fixture(scope="module")
def scratch(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(colours, tmp_path_factory.mktemp("none") / "out", "--method", "none", "--epochs", "1")


def page_of(out: Path) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


@pytest.mark.full
def test_the_page_holds_the_numbers_of_the_run(chosen: Path) -> None:
    page, figures = page_of(chosen), figures_of(page_of(chosen))[""]
    record = yaml.safe_load((chosen / "run.yaml").read_text())
    stages = yaml.safe_load((chosen / "stages.yaml").read_text())
    assert headings(page) == [
        "What came out", "Epoch by epoch", "The parts of the data", "Student and teacher, layer by layer",
        "The stages", "What it cost", "What was run",
    ]  # fmt: skip
    assert f"{100 * record['result']['top1']:.2f}%" in page
    assert record["result"]["versions"]["torch"] in page
    moments = [Similarity.load(chosen / f"similarity.{when}.npz") for when in ("before", "choice", "after")]
    *heatmaps, last = (panel["data"][0] for panel in figures["similarities"])
    for drawn, similarity in zip(heatmaps, moments, strict=True):
        np.testing.assert_allclose(numbers(drawn["z"]), similarity.between("tiny_vit", "teacher").values, rtol=1e-6)
    change = moments[2].between("tiny_vit", "teacher").values - moments[0].between("tiny_vit", "teacher").values
    np.testing.assert_allclose(numbers(last["z"]), change, atol=1e-7)
    rows = {name.removeprefix("● "): name.startswith("● ") for name in last["y"]}
    assert [row["layer"] for row in stages["stages"] if row["chosen"]] == [
        name for name, marked in rows.items() if marked
    ]
    for row in stages["stages"]:
        assert row["reason"].replace("'", "&#39;") in page
    assert "The stages were chosen by CKA (--stages auto). In our study" in page
    loss, accuracy, *_ = ({line["name"]: line for line in panel["data"]} for panel in figures["curves"])
    assert loss["ofa"]["x"] == [1, 2, 3]
    assert set(accuracy) == {"train_top1", "validation_top1", "validation_top1_ema"}
    assert loss["ofa"]["y"][0] > 0
    branch = f"branch_{stages['chosen'][0]}"
    assert loss[branch]["y"][0] is None, "it joined after the first epoch"


@pytest.mark.full
def test_the_pictures_lie_beside_it(chosen: Path, scratch: Path) -> None:
    for picture in ("curves", "cka"):
        assert {path.name for path in chosen.glob(f"{picture}.*")} == {f"{picture}.{s}" for s in ("png", "svg", "pdf")}
    assert not list(scratch.glob("cka.*")), "there was nothing to compare with"


def test_a_run_without_teacher_has_no_empty_sections(scratch: Path) -> None:
    page = page_of(scratch)
    assert headings(page) == [
        "What came out",
        "Epoch by epoch",
        "The parts of the data",
        "What it cost",
        "What was run",
    ]
    assert "Teacher" not in page.replace("distill --teacher", "").split("<script")[0]


@pytest.mark.full
def test_fitnet_shows_its_pairs_and_no_branches(colours: Path, tmp_path: Path) -> None:
    more = ("--method", "fitnet", "--teacher", spec("teacher"), "--stages", "2,4", "--epochs", "1")
    page = page_of(run(colours, tmp_path / "out", *more))
    assert "parameters of its branch" not in page
    assert "Its exit branches" not in page
    change = figures_of(page)[""]["similarities"][-1]
    assert len(change["layout"]["shapes"]) == 4, "two frames, each black and white"


def test_a_run_is_drawn_again_from_its_files_alone(chosen: Path, tmp_path: Path) -> None:
    shutil.copytree(chosen, tmp_path / "run")
    for name in ("report.html", "student.safetensors", "cka.png"):
        (tmp_path / "run" / name).unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert page_of(tmp_path / "run") == page_of(chosen)
    assert (tmp_path / "run" / "cka.png").is_file()


@pytest.mark.full
def test_an_unfinished_run_is_drawn_as_such(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, said in ((2, "0 of 3 epochs have ended"), (9, "1 of 3 epochs have ended")):
        out = tmp_path / str(steps)
        killed_after(steps, monkeypatch, options(), out)
        assert main(["report", str(out)]) == 0
        assert said in page_of(out)
        assert "100.00%" in page_of(out), "the teacher's accuracy is known"
        assert not (out / "run.yaml").exists(), "it can still go on"
    main(["report", str(tmp_path / "9")])
    assert f"Report: {tmp_path / '9' / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", "a: ["),
        ("run.yaml", "options: 3"),
        ("stages.yaml", "- 1"),
        ("run.yaml", "[" * 5000),
        ("run.yaml", "command: x\noptions: {}\nresult: {}"),
        ("run.yaml", "command: x\noptions: []\nresult: {top1: high}"),
        ("stages.yaml", "{rule: all, chosen: [1], stages: []}"),
        ("stages.yaml", "{rule: all, chosen: [1], stages: [3]}"),
        ("stages.yaml", "{rule: all, chosen: one, stages: null}"),
        ("metrics.csv", "epoch,top1\n1,much\n"),
        ("metrics.csv", "epoch,top1\n1,0.5\n"),
        ("metrics.csv", "epoch,top1,lr,images_per_second\n1,0.5,0.1,3,4\n"),
        ("metrics.csv", "epoch,top1,lr,images_per_second\n1,\0,0.1,3\n"),
        ("similarity.after.npz", "no archive"),
    ],
)
def test_a_damaged_file_is_one_message(
    chosen: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chosen, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "run" / name) in error
    assert error.count("\n") == 1


def test_names_of_users_are_escaped(scratch: Path) -> None:
    evil = "<img src=x onerror=alert(1)></script>&\"'"
    record = read_record(scratch)
    result = {**record.result, "student": {**record.result["student"], "name": evil}}
    page = report_page(Record(evil.strip("'"), {**record.options, "data": evil}, result, record.metrics, {}, {}))
    assert "<img src=x" not in page


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page in")
def test_the_page_opens_in_a_browser_and_draws_every_figure(chosen: Path, scratch: Path, tmp_path: Path) -> None:
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path}"]
    for out, figures, heatmaps in ((chosen, 8, 4), (scratch, 4, 0)):
        done = subprocess.run([*command, (out / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
        drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
        assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == figures
        assert drawn.count('class="heatmaplayer') >= heatmaps
