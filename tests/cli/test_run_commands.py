"""What the commands do with folders: drawing that fails, runs that are finished, folders of version 0.1, options."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.distill.outputs import report as distill_report
from cka_probe.reports import report
from cka_probe.runtime.folder.run_folder import PRIVATE
from tests.folders import names

pytestmark = pytest.mark.slow

COMPARE = ["compare", "zoo:cnn", "--layers", "stages", "--examples", "32", "--batch-size", "8"]
DISTILL = ["distill", "--method", "none", "--student", "zoo:mlp@random", "--epochs", "1", "--batch-size", "719",
           "--workers", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "compared"
    assert main([*COMPARE, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "distilled"
    assert main([*DISTILL, "--out", str(out)]) == 0
    return out


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("command", ["compare", pytest.param("distill", marks=pytest.mark.full)])
@pytest.mark.parametrize("error", [ValueError("no font"), KeyboardInterrupt()], ids=["raises", "interrupted"])
def test_drawing_that_fails_loses_no_number_and_resume_draws_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str,
    error: BaseException,
) -> None:  # fmt: skip
    out, arguments = tmp_path / "out", {"compare": COMPARE, "distill": DISTILL}[command]
    with monkeypatch.context() as broken:
        for module in (report, distill_report):
            broken.setattr(module, "save_figure", failing(error))
        code = main([*arguments, "--out", str(out)])
    said = capsys.readouterr().err
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert f"cka-probe report {out}" in said
    assert "Traceback" not in said
    assert (out / "run.yaml").is_file()
    assert (out / ("similarity.npz" if command == "compare" else "student.safetensors")).is_file()
    assert not (out / "report.html").exists()
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert (out / "report.html").is_file()
    assert {path.name for path in (out / PRIVATE).iterdir()} == {"lock", "manifest"}


@pytest.mark.full
def test_one_command_line_with_resume_serves_a_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (COMPARE, DISTILL):
        command = [*arguments, "--resume", "--out", str(tmp_path / arguments[0])]
        assert main(command) == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / arguments[0]).iterdir() if path.is_file()}
        assert main(command) == 0, "and again, when it is finished"
        assert before == {
            path.name: path.read_bytes() for path in (tmp_path / arguments[0]).iterdir() if path.is_file()
        }
    assert main(["distill", "--resume", "--out", str(tmp_path / "nothing")]) == 2
    assert "without --student none can be started" in capsys.readouterr().err


@pytest.mark.full
def test_an_option_that_is_given_must_be_the_run_s_be_it_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([*DISTILL, "--lr", "0.001", "--out", out]) == 0
    assert main(["distill", "--resume", "--out", out]) == 0
    assert main(["distill", "--resume", "--lr", "0.001", "--workers", "1", "--out", out]) == 0
    for given in (["--lr", "0.0005"], ["--seed", "0", "--epochs", "2"], ["--recipe", "digits"]):
        assert main(["distill", "--resume", *given, "--out", out]) == 2
        assert "resumed with the options it was started with, but" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_of_version_0_1_is_read_and_reported_on_and_never_changed(
    compared: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, arguments in ((compared, COMPARE), (distilled, DISTILL)):
        old = tmp_path / run.name
        shutil.copytree(run, old)
        shutil.rmtree(old / PRIVATE)
        before = {path.name: path.read_bytes() for path in old.iterdir()}
        assert main(["report", str(old)]) == 0
        assert capsys.readouterr().out == f"Report: {old / 'report' / 'report.html'}\n"
        assert main(["report", str(old)]) == 0, "which makes one more"
        assert main(["report", str(old), "--out", str(tmp_path / f"{run.name} drawn")]) == 0
        assert "report.html" in names(tmp_path / f"{run.name} drawn")
        for flag in ("--overwrite", "--resume"):
            assert main([*arguments, flag, "--out", str(old)]) == 2
            assert "holds a run of cka-probe 0.1" in capsys.readouterr().err
        assert before == {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}
        assert {path.name for path in old.iterdir() if path.is_dir()} == {"report", "report-1"}


def test_nothing_that_a_command_reads_is_replaced_by_it(
    compared: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (
        run,
        student,
        features,
    ) = (tmp_path / name for name in ("run", "student", "features"))
    shutil.copytree(compared, run)
    shutil.copytree(distilled, student)
    assert main(["extract", "zoo:cnn", "--examples", "32", "--layers", "stages", "--out", str(features)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    commands = [
        ["report", "--before", str(compared), "--after", str(run), "--out", str(run)],
        ["report", "--before", str(compared), "--after", str(compared), "--out", str(run)],
        ["report", str(compared), "--out", str(run)],
        ["compare", str(features), "--out", str(features)],
        ["distill", "--method", "none", "--student", f"zoo:mlp@{student}/student.safetensors", "--out", str(student)],
        ["distill", "--config", str(student / "run.yaml"), "--out", str(student)],
    ]  # fmt: skip
    for command in commands:
        assert main([*command, "--overwrite"]) == 2, command
        assert "Name another folder" in capsys.readouterr().err
    for path, content in before.items():
        assert path.read_bytes() == content, path


def test_a_finished_run_of_a_file_that_changed_is_not_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, {}))\n"
    (tmp_path / "own.py").write_text(code.format(4))
    command = ["compare", f"{tmp_path}/own.py:net", "--layers", "all", "--image-size", "32", "--examples", "16",
               "--batch-size", "8", "--resume", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    assert main(command) == 0
    assert "holds this run, finished" in capsys.readouterr().out
    (tmp_path / "own.py").write_text(code.format(5))
    assert main(command) == 2
    assert "holds a finished run. Name another folder" in capsys.readouterr().err


def test_an_extraction_that_was_killed_while_its_files_were_moved_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cka_probe.probing import extract as extraction

    command = ["extract", "zoo:cnn", "--layers", "stages", "--examples", "32", "--batch-size", "8",
               "--checkpoint-minutes", "0", "--out"]  # fmt: skip
    assert main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as broken:
        broken.setattr(extraction, "write_record", failing(KeyboardInterrupt()))
        assert main([*command, str(tmp_path / "cut")]) == 130
    assert main([*command, str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = ((tmp_path / name / "zoo_cnn.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_page_that_was_edited_is_not_drawn_over(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    (run / "report.html").write_text("my notes")
    for command in (["report", str(run)], [*COMPARE, "--overwrite", "--out", str(run)]):
        assert main(command) == 2
        assert f"report.html in {run} was changed since cka-probe wrote it" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "my notes"


def test_options_that_cannot_be_make_no_folder(tmp_path: Path) -> None:
    for command in (
        [*COMPARE, "--batch-size", "1"], [*COMPARE, "--device", "meta"], [*DISTILL, "--lr", "nan"],
        ["extract", "zoo:cnn", "--data", "nowhere"], ["report", str(tmp_path / "nowhere")],
    ):  # fmt: skip
        assert main([*command, *(["--out", str(tmp_path / "out")] if command[0] != "report" else [])]) == 2
        assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_folder_of_the_caller_keeps_its_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    models = {name: rng.standard_normal((32, 4)) for name in "xy"}
    mine = {"thesis.txt": "years", "last.ckpt": "of", "features-0.f32": "work"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    for resume in (False, True, True):
        cp.compare(models, batch_size=8, checkpoint=tmp_path, resume=resume, checkpoint_minutes=0)
        assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == mine


def test_images_that_changed_behind_their_names_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cka_probe.runtime import terminal

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")

    def interrupt(self: terminal.Progress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    command = [*COMPARE, "--data", str(tmp_path / "images"), "--workers", "0", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(terminal.Progress, "__call__", interrupt)
        assert main(command) == 130
    path = tmp_path / "images" / "7.png"
    before = path.read_bytes()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    assert main([*command, "--resume"]) == 2
    assert "images" in capsys.readouterr().err
    path.write_bytes(before)
    assert main([*command, "--resume"]) == 0
