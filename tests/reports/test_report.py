"""The report of a run: whole, self-contained, drawn again from the files alone."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cka_probe.cli.main import main
from cka_probe.cli.presets import PRESETS
from cka_probe.errors import OutputError
from cka_probe.reports.report import draw, report_page
from cka_probe.reports.run_files import Run, read_comparison
from cka_probe.reports.writing import write_comparison
from cka_probe.results.agreement import agreement
from cka_probe.results.findings import matched_curves
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.folder.run_folder import RunFolder
from tests.folders import names
from tests.pages import figures_of, numbers

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FILES = {
    *(f"{name}.{suffix}" for name in ("heatmap", "profile") for suffix in ("png", "svg", "pdf")),
    "report.html", "run.yaml", "samples.png", "similarity.csv", "similarity.npz",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks on 64 digits, two measures."""
    out = tmp_path_factory.mktemp("run") / "out"
    command = ["compare", "zoo:cnn", "zoo:mlp", "--examples", "64", "--batch-size", "16", "--out", str(out)]
    assert main([*command, "--measures", "cka,cka-rbf"]) == 0
    return out


def test_a_comparison_writes_its_report_and_pictures(run: Path) -> None:
    assert b"/Type3" not in (run / "heatmap.pdf").read_bytes()
    assert ">zoo:cnn<" in (run / "heatmap.svg").read_text()
    rbf = {f"{name}.cka-rbf.{suffix}" for name in ("heatmap", "profile") for suffix in ("png", "svg", "pdf")}
    assert names(run) == FILES | rbf | {"similarity.cka-rbf.npz"}


def test_the_page_holds_the_numbers_of_the_result(run: Path) -> None:
    page = (run / "report.html").read_text()
    similarity = Similarity.load(run / "similarity.npz")
    figures = figures_of(page)
    assert list(figures) == ["", "cka", "cka-rbf"]
    drawn = figures["cka"]["heatmap"][0]["data"][0]
    block = similarity.between("zoo:mlp", "zoo:cnn")
    np.testing.assert_allclose(numbers(drawn["z"]), block.values, rtol=1e-6)
    np.testing.assert_allclose(numbers(drawn["customdata"]), np.stack([block.std_error, block.null], -1), rtol=1e-6)
    assert drawn["y"] == [layer.name for layer in block.rows]
    assert "cka-probe compare zoo:cnn zoo:mlp" in page
    assert "64 images are few" in page
    assert page.count('<img src="data:image/png;base64,') == 16, "eight images as each of the two saw them"


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    page = (run / "report.html").read_text()
    own = page.replace(re.search(r"<script>/\*\*.*?</script>", page, re.DOTALL)[0], "")  # type: ignore[index]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert "@import" not in own


def test_names_of_users_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)></script>&\"'"
    layers = (Layer(evil, "l0"), Layer("other", evil))
    provenance = {
        "subjects": [{"name": evil, "parameters": 1, "features": {}, "preprocessing": evil, "left_out": {evil: evil}}]
    }
    similarity = Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers, "cka", Provenance.from_record(provenance))
    page = report_page(Run({"cka": similarity}, {"command": evil}, {}))
    assert "<img src=x" not in page
    axis = figures_of(page)["cka"]["heatmap"][0]["layout"]["xaxis"]
    assert axis["title"]["text"] == html.escape(evil, quote=False), "plotly reads it as HTML"


@pytest.mark.slow
def test_a_finished_run_is_drawn_again_from_its_files_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_text()
    for path in (tmp_path / "run").glob("heatmap*"):
        path.unlink()
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert names(tmp_path / "run") == names(run) | {"notes.txt"}
    assert figures_of((tmp_path / "run" / "report.html").read_text()) == figures_of(before)


def test_a_folder_without_a_finished_run_says_so(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "must hold run.yaml and similarity.npz" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "report takes the folder of a run, or two of them to compare" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_text("a: [")
    with pytest.raises(OutputError, match=r"run\.yaml cannot be read"):
        read_comparison(tmp_path / "run")


@pytest.mark.full
def test_the_change_between_two_runs_is_drawn_and_tabled(run: Path, tmp_path: Path) -> None:
    again = ["compare", "zoo:cnn", "theirs=zoo:mlp@random", "--examples", "64", "--batch-size", "16"]
    assert main([*again, "--out", str(tmp_path / "after")]) == 0
    out = tmp_path / "change"
    assert main(["report", "--before", str(run), "--after", str(tmp_path / "after"), "--out", str(out)]) == 0
    assert names(out) == {f"difference.{suffix}" for suffix in ("csv", "pdf", "png", "svg")}
    table = pd.read_csv(out / "difference.csv")
    # Before version 3, pandas reads a number that may be its neighbour.
    np.testing.assert_allclose(table.change, table.after - table.before, atol=1e-15)
    other = [
        "compare",
        "zoo:cnn",
        "zoo:vit",
        "--layers",
        "stages",
        "--examples",
        "16",
        "--out",
        str(tmp_path / "other"),
    ]
    assert main(other) == 0
    assert main(["report", "--before", str(run), "--after", str(tmp_path / "other"), "--out", str(tmp_path / "x")]) == 2


@pytest.mark.full
def test_runs_that_were_not_measured_alike_have_no_difference(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["compare", "zoo:cnn", "zoo:mlp", "--examples", "32", "--batch-size", "16"]
    for name, option in (("biased", "--measures=cka:biased"), ("pooled", "--pool=mean"), ("fewer", "--seed=1")):
        assert main([*again, option, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    for name, said in (("biased", "has cka, cka-rbf and "), ("pooled", "pool is none in")):
        change = ["report", "--before", str(run), "--after", str(tmp_path / name), "--out", str(tmp_path / "change")]
        assert main(change) == 2
        assert said in capsys.readouterr().err
    assert main([*change[:4], str(tmp_path / "fewer"), *change[5:]]) == 0
    assert "different images" in capsys.readouterr().err


@pytest.mark.full
def test_a_preset_arranges_its_panels_and_has_both_estimators(tmp_path: Path) -> None:
    out = tmp_path / "fig1"
    assert main(["compare", "--preset", "ofa-fig1", "--layers", "stages", "--examples", "32", "--out", str(out)]) == 0
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert record["panels"]["pairs"][:3] == [
        ["zoo:cnn", "zoo:cnn-2"],
        ["zoo:vit", "zoo:vit-2"],
        ["zoo:mlp", "zoo:mlp-2"],
    ]
    results = read_comparison(out).results
    assert {name: result.provenance.debiased for name, result in results.items()} == {
        "cka:biased": False,
        "cka": True,
    }
    assert (out / "atlas.png").is_file()
    assert main(["compare", "zoo:cnn", "--preset", "ofa-fig1", "--out", str(tmp_path / "no")]) == 2
    assert PRESETS["ofa-fig1"].columns == 3


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page in")
def test_the_page_opens_in_a_browser_and_draws_every_figure(run: Path, tmp_path: Path) -> None:
    assert BROWSER
    drawn = opened(run / "report.html", tmp_path)
    assert drawn.count('class="heatmaplayer') == 3
    assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == 4, "a heatmap, the profile, a panel a measure"


def opened(page: Path, scratch: Path) -> str:
    """The page as a browser has drawn it, without its scripts."""
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    command += ["--disable-background-networking", f"--user-data-dir={scratch / 'browser'}", page.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in two views of 32 digits, two measures."""
    out = tmp_path_factory.mktemp("views") / "out"
    command = ["compare", "zoo:cnn", "--view", "identity,blur:2", "--examples", "32", "--layers", "stages"]
    assert main([*command, "--measures", "cka,cka-rbf", "--out", str(out)]) == 0
    return out


@pytest.mark.full
def test_two_views_of_a_network_have_a_table_and_a_figure_of_their_layers(views: Path, tmp_path: Path) -> None:
    assert {path.name for path in views.glob("layers*")} == {
        f"layers.{suffix}" for suffix in ("csv", "pdf", "png", "svg")
    }
    table = pd.read_csv(views / "layers.csv")
    similarity = Similarity.load(views / "similarity.npz")
    block = similarity.between("zoo:cnn [identity]", "zoo:cnn [blur:2]")
    np.testing.assert_allclose(table[table.measure == "cka"].value, block.values.diagonal())
    page = (views / "report.html").read_text()
    assert "through the view <b>blur:2</b>" in page
    assert "The same layer in two views" in page
    record = yaml.safe_load((views / "run.yaml").read_text())
    assert record["options"]["views"] == "identity,blur:2"
    assert record["result"]["subjects"][1]["view"] == {"name": "blur:2", "sigma": 2.0}
    if BROWSER:
        drawn = opened(views / "report.html", tmp_path)
        assert len(re.findall(r'class="[^"]*js-plotly-plot', drawn)) == 5, "and the layers in both views"


@pytest.mark.full
def test_the_figures_of_several_pairs_of_views_are_named_by_them(tmp_path: Path) -> None:
    subjects = [
        {"name": f"{letter} [{name}]", "model": letter, "features": {}}
        for letter in "ab"
        for name in ("identity", "blur:2")
    ]
    layers = tuple(Layer(subject["name"], "l0") for subject in subjects)
    both = Similarity(
        np.eye(4), np.eye(4), np.eye(4), layers, layers, "cka", Provenance.from_record({"subjects": subjects})
    )
    draw(tmp_path, Run({"cka": both}, {}, {}))
    assert {path.name for path in tmp_path.glob("layers*.png")} == {
        f"layers-{letter}_identity-{letter}_blur_2.png" for letter in "ab"
    }


@pytest.mark.slow
def test_a_run_drawn_again_keeps_its_layers(views: Path, tmp_path: Path) -> None:
    shutil.copytree(views, tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "layers.csv").read_text() == (views / "layers.csv").read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in views.iterdir()}


@pytest.mark.slow
def test_the_measures_of_a_run_keep_the_order_in_which_they_were_asked_for(tmp_path: Path) -> None:
    layers = (Layer("a", "l0"), Layer("b", "l0"))
    measures = ("rsa", "procrustes", "cka")
    results = {
        name: Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers, name, {"n": name}) for name in measures
    }
    with RunFolder(tmp_path / "out") as folder:
        write_comparison(folder, Run(results, {}, {}))
    assert tuple(read_comparison(tmp_path / "out").results) == measures


def test_the_page_says_how_alike_the_measures_order_the_layers(run: Path) -> None:
    page = (run / "report.html").read_text()
    results = read_comparison(run).results
    found = agreement(results, "zoo:cnn", "zoo:mlp")
    assert found is not None
    assert f'<td class="number">{found.correlation[0, 1]:.2f}</td>' in page
    worst = found.disagreements[0]
    assert (
        f"<code>{worst.first.name}</code> and <code>{worst.second.name}</code>: number {worst.near_rank} of 64" in page
    )


@pytest.mark.slow
def test_the_page_shows_the_curve_the_influential_images_and_the_p_values(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["compare", "zoo:cnn", "zoo:mlp", "--examples", "64", "--batch-size", "16", "--layers", "stages"]
    asked = ["--curve", "--influence", "12", "--permutations", "9", "--measures", "cka,rsa"]
    assert main([*command, *asked, "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    similarity = Similarity.load(out / "similarity.npz")
    assert similarity.curve is not None
    line = figures_of(page)["cka"]["curve"][0]["data"][0]
    assert line["x"] == similarity.curve.examples.tolist()
    values, errors = matched_curves(similarity, "zoo:cnn", "zoo:mlp")
    np.testing.assert_allclose(numbers(line["y"]), values.mean(1))
    np.testing.assert_allclose(numbers(line["error_y"]["array"]), np.nan_to_num(2 * errors.mean(1)))
    assert (errors[1:] > 0).all()
    heatmap = figures_of(page)["cka"]["heatmap"][0]["data"][0]
    p_value = similarity.between("zoo:mlp", "zoo:cnn").p_value
    assert p_value is not None
    np.testing.assert_allclose(numbers(heatmap["customdata"])[..., 2], p_value, rtol=1e-6)
    assert "p = %{customdata[2]:.3f}" in heatmap["hovertemplate"]
    assert all(page.count(f"<code>{one.example}</code>") == 1 for one in similarity.influence[:10])
    assert "2 more in <code>influence.csv</code>" in page
    assert "; p = 0.1</span>" in page  # of nine permutations none reaches the value


@pytest.mark.slow
def test_a_useless_estimate_is_told_at_the_top_of_the_page_and_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = []
    for name in "xy":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(ord(name)).normal(size=(16, 8)))
        models.append(str(tmp_path / f"{name}.npy"))
    said = "The shuffled control should be near 0, but lies up to 0."
    for batch, useless in ((4, True), (16, False)):
        out = tmp_path / str(batch)
        assert main(["compare", *models, "--batch-size", str(batch), "--out", str(out)]) == 0
        page = (out / "report.html").read_text()
        top = page[page.index("<main>") : page.index("<h2>")]
        assert (said in top) is (said in capsys.readouterr().err) is useless
