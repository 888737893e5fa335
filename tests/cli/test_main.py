"""The command line: what it writes, what it says, and what it exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import cka_probe as cp
from cka_probe.cli.main import main
from tests.folders import files_below, names

PICTURES = {f"{name}.{suffix}" for name in ("heatmap", "profile") for suffix in ("png", "svg", "pdf")}
FILES = {"similarity.npz", "similarity.csv", "run.yaml", "report.html", "samples.png"} | PICTURES
QUICK = ["--examples", "32", "--batch-size", "16"]


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # tyro's own errors
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert run("compare", "zoo:cnn", "net=zoo:vit", *QUICK, "--out", str(out)) == 0
    return out


def test_a_comparison_writes_result_table_pictures_and_record(finished: Path) -> None:
    assert names(finished) == FILES
    assert [path.name for path in finished.parent.iterdir()] == ["first"], "nothing is left beside it"
    similarity = cp.Similarity.load(finished / "similarity.npz")
    assert similarity.models == ("zoo:cnn", "net")
    table = pd.read_csv(finished / "similarity.csv")
    assert list(table) == [
        "row_model", "row_layer", "col_model", "col_layer", "measure", "value", "std_error", "null",
    ]  # fmt: skip
    assert len(table) == similarity.values.size
    np.testing.assert_allclose(table.value, similarity.values.ravel(), rtol=1e-12)
    with Image.open(finished / "heatmap.png") as picture:
        assert picture.size[0] > 400
    svg = (finished / "heatmap.svg").read_text()
    assert svg.lstrip().startswith("<?xml")


@pytest.mark.full
def test_the_record_holds_options_versions_and_a_command_that_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    record = yaml.safe_load((finished / "run.yaml").read_text())
    assert record["options"]["examples"] == 32
    assert record["options"]["seed"] == 0
    assert record["result"]["versions"]["timm"]
    assert len(record["result"]["data"]["sample_sha256"]) == 64
    command = record["command"].split()
    assert command[:2] == ["cka-probe", "compare"]
    again = tmp_path / "again"
    assert run(*command[1:-1], str(again)) == 0
    first, second = (cp.Similarity.load(out / "similarity.npz") for out in (finished, again))
    np.testing.assert_array_equal(first.values, second.values)


@pytest.mark.slow
def test_a_second_measure_stands_beside_the_first(tmp_path: Path) -> None:
    out = tmp_path / "both"
    assert run("compare", "zoo:cnn", *QUICK, "--measures", "cka,cka-rbf", "--out", str(out)) == 0
    extra = {"similarity.cka-rbf.npz"} | {name.replace(".", ".cka-rbf.") for name in PICTURES}
    assert names(out) == FILES | extra
    assert set(pd.read_csv(out / "similarity.csv").measure) == {"cka", "cka-rbf"}


@pytest.mark.full
def test_an_overwritten_run_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for measures in ("cka,cka-rbf", "cka"):
        assert run("compare", "zoo:cnn", *QUICK, "--measures", measures, "--overwrite", "--out", str(tmp_path)) == 0
    assert names(tmp_path) == FILES | {"notes.txt"}


@pytest.mark.slow
def test_a_finished_run_is_overwritten_only_when_asked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "similarity.npz").read_bytes()
    assert run("compare", "zoo:cnn", *QUICK, "--out", str(finished)) == 2
    assert "holds a finished run. Name another folder, or add --overwrite" in capsys.readouterr().err
    assert (finished / "similarity.npz").read_bytes() == before
    assert run("compare", "zoo:cnn", "net=zoo:vit", *QUICK, "--out", str(finished), "--overwrite") == 0
    assert names(finished) == FILES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet81"], "no model named 'resnet81'. Close names: resnet18"),
        (["zoo:cnn@nowhere.pth"], "The checkpoint nowhere.pth does not exist"),
        (["zoo:cnn", "zoo:cnn"], "first=zoo:cnn second=zoo:cnn"),
        (["zoo:cnn", "--data", "nowhere"], "there is no folder 'nowhere'"),
        (["zoo:cnn", "--examples", "3"], "--examples must be a whole number from 4 to"),
        (["zoo:cnn", "--batch-size", "2"], "--batch-size must be a whole number from 4 to"),
        (["zoo:cnn", "--layers", "layer9"], "No layer of 'zoo:cnn' matches 'layer9'. Close names: 'layer"),
        (["zoo:cnn", "--device", "cuda:7"], "--device must be auto or one of cpu"),
        (["zoo:cnn", "--measures", "cca"], "Did you mean 'mean-cca' or 'svcca' or 'pwcca'?"),
        ([], "at least one model"),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("compare", *arguments, "--out", str(tmp_path / "deep" / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert files_below(tmp_path) == []


def test_a_file_that_is_no_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (32, 32), (40 * index, 0, 0)).save(folder / f"{index}.jpg")
    (folder / "3.jpg").write_text("no image")
    assert run("compare", "zoo:cnn", "--data", str(folder), "--out", str(tmp_path / "out")) == 2
    assert "3.jpg must be an image" in capsys.readouterr().err
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_an_out_that_is_taken_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    assert run("compare", "zoo:cnn", "--out", str(out)) == 2
    assert ("is a file" if taken == "file" else "holds notes.txt. Name another folder") in capsys.readouterr().err
    assert (out if taken == "file" else out / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_an_empty_out_is_used(tmp_path: Path) -> None:
    assert run("compare", "zoo:cnn", *QUICK, "--out", str(tmp_path)) == 0
    assert names(tmp_path) == FILES


def test_unknown_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "zoo:cnn", "--out", "x", "--nonsense") == 2
    assert run("measure") == 2
    assert run() == 2
    assert "Traceback" not in capsys.readouterr().err


def test_layers_are_listed_with_their_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("layers", "zoo:vit", "--layers", "stages") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        [f"blocks.{index}", "65", "x", "48", "Block"] for index in (0, 2, 6, 7)
    ]  # fmt: skip


@pytest.mark.slow
def test_progress_and_messages_go_to_standard_error_and_results_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", "zoo:cnn", "zoo:mlp", *QUICK, "--out", str(tmp_path / "out")) == 0
    output = capsys.readouterr()
    assert "32 of 32 images" in output.err
    assert "zoo:cnn and zoo:mlp agree most at" in output.out
    assert f"Heatmap: {tmp_path / 'out' / 'heatmap.png'}" in output.out


INTERRUPTED_WHILE_IMPORTED = """
import os, signal, time
exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
"""


@pytest.mark.full
def test_an_interrupt_exits_with_130_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(INTERRUPTED_WHILE_IMPORTED)
    command = [sys.executable, "-m", "cka_probe", "compare", "own.py:network", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was written" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_below(tmp_path / "out") == []


@pytest.mark.full
def test_an_interrupt_in_the_loop_leaves_nothing_behind_but_what_a_run_can_go_on_with(tmp_path: Path) -> None:
    command = ["zoo:vit", "zoo:cnn", "--batch-size", "8", "--layers", "all", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "cka_probe", "compare", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        seen = process.stderr.readline() + process.stderr.readline()  # it is at work
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130, seen + rest
    assert "Traceback" not in rest
    left = files_below(tmp_path / "out")
    assert all(name.startswith(".cka-probe/") for name in left)  # none where it came before the first batch
    assert ("--resume" in rest) == bool(left)


def test_a_bug_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cka_probe.probing.compare.run_comparison", broken)
    with pytest.raises(ZeroDivisionError):
        main(["compare", "zoo:cnn", "--out", str(tmp_path / "out")])


def test_help_and_version_import_nothing_heavy() -> None:
    program = (
        "import sys, json\nfrom cka_probe.cli.main import main\n"
        "try: main(['compare', '--help'])\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'timm', 'matplotlib', 'numpy', 'pandas')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.splitlines()[-1]) == []
    for option in ("--layers", "--examples", "--out", "--data"):
        assert option in output


def test_the_public_names_are_these_and_all_load() -> None:
    expected = {
        "CC", "CRD", "DIST", "DKD", "FBT", "FitNet", "KD", "OBoW", "OFA", "RKD", "RSD", "Scratch", "Words",
        "distill",
        "CkaProbeError", "Curve", "Influence", "Layer", "Preprocessing", "Provenance", "Similarity", "Subject",
        "capture", "compare",
        "EnergyDistance", "LinearCKA", "MMD", "Mantel", "MeanCCA", "MutualKNN", "PWCCA", "Procrustes", "RSA", "RbfCKA",
        "SVCCA", "Wasserstein",
        "energy_distance", "evaluate", "extract", "linear_cka", "load_subject", "mantel", "mean_cca", "mmd",
        "mutual_knn",
        "plot_atlas", "plot_curve", "plot_difference", "plot_heatmap", "plot_layers", "plot_pairs", "plot_profile",
        "procrustes", "procrustes_angle", "pwcca", "rbf_cka", "rsa", "svcca", "wasserstein", "write_report",
    }  # fmt: skip
    assert set(cp.__all__) == expected == set(dir(cp))
    for name in expected:
        assert callable(getattr(cp, name))
    with pytest.raises(AttributeError, match="No cka_probe attribute nothing"):
        _ = cp.nothing


@pytest.mark.slow
def test_a_user_s_network_with_its_checkpoint_and_images(tmp_path: Path, image_folder: Path) -> None:
    from tests.toy_networks import small_cnn

    torch.save({"state_dict": small_cnn().state_dict()}, tmp_path / "best.pth")
    spec = f"{Path(__file__).parents[1] / 'toy_networks.py'}:small_cnn@{tmp_path / 'best.pth'}"
    out = tmp_path / "out"
    code = run(
        "compare", spec, "zoo:cnn", "--data", str(image_folder), "--image-size", "32", "--layers", "blocks,type:Conv2d",
        "--batch-size", "6", "--workers", "0", "--out", str(out),
    )  # fmt: skip
    assert code == 0
    assert cp.Similarity.load(out / "similarity.npz").models == ("small_cnn@best", "zoo:cnn")


def test_a_folder_that_cannot_be_written_is_told_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    place = "/proc/cka-probe/out" if os.path.isdir("/proc") else "/dev/null/out"
    assert run("compare", "zoo:cnn", "--out", place) == 2
    assert "cannot" in capsys.readouterr().err
