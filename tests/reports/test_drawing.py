"""Whatever matplotlib is told by its user, the pictures in a run's folder are the same, and the user's own are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from cka_probe.reports.drawing import Figure, own_settings
from cka_probe.reports.plots import plot_heatmap
from cka_probe.reports.report import draw
from cka_probe.reports.run_files import Run
from cka_probe.results.similarity import Layer, Similarity

DRAW = """
import hashlib, sys
from pathlib import Path
import numpy as np
from cka_probe.reports.drawing import own_settings
from cka_probe.reports.figures.heatmaps import plot_pairs
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.reports.drawing import own_settings
from cka_probe.reports.figures.heatmaps import plot_pairs
from cka_probe.results.similarity import Layer, Similarity
import matplotlib
before = dict(matplotlib.rcParams)
layers = tuple(Layer(model, name) for model in "ab" for name in ("one", "two", "three"))
with own_settings():
    plot_pairs(Similarity(*np.ones((3, 6, 6)), layers, layers)).savefig(Path(sys.argv[1]) / "heatmap.png")
assert dict(matplotlib.rcParams) == before
print(hashlib.sha256((Path(sys.argv[1]) / "heatmap.png").read_bytes()).hexdigest())
"""


def similarity() -> Similarity:
    layers = tuple(Layer(model, name) for model in "ab" for name in ("one", "two", "three"))
    values = np.corrcoef(np.random.default_rng(0).normal(size=(6, 9)))
    return Similarity(values, values * 0, values * 0, layers, layers)


def drawn(folder: Path, settings: str | bytes | None, **environment: str) -> tuple[str, str]:
    """What a process prints that draws beside these settings, and what it says of them."""
    folder.mkdir()
    out = folder / "out"
    out.mkdir()
    if settings is not None:
        (folder / "matplotlibrc").write_bytes(settings if isinstance(settings, bytes) else settings.encode())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(out)], capture_output=True, text=True, cwd=folder, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.full
def test_settings_of_the_user_do_not_reach_the_files(tmp_path: Path) -> None:
    plain = drawn(tmp_path / "plain", None)
    assert plain[1] == ""
    strange = "text.usetex: True\nfont.size: 30\nfont.family: nosuch\nsavefig.dpi: 30\nfigure.facecolor: red\n"
    broken = "no setting\nfoo: bar\nfont.size: large, very\nbackend: nosuch\n"
    assert drawn(tmp_path / "strange", strange) == plain
    assert drawn(tmp_path / "broken", broken, MPLBACKEND="module://nosuch") == plain
    assert drawn(tmp_path / "bytes", b"font.size: \xff\xfe\n", MPLBACKEND="nosuch") == plain


@pytest.mark.slow
def test_settings_that_were_changed_in_the_process_are_left_alone_and_not_used(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "changed").mkdir()
    draw(tmp_path / "plain", Run({"cka": similarity()}, {}, {}))
    with matplotlib.rc_context(
        {"text.usetex": True, "font.size": 40, "savefig.bbox": "tight", "axes.facecolor": "red"}
    ):
        before = dict(matplotlib.rcParams)
        draw(tmp_path / "changed", Run({"cka": similarity()}, {}, {}))
        assert dict(matplotlib.rcParams) == before
    for name in ("heatmap.png", "profile.png"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "changed" / name).read_bytes()


def test_axes_of_the_user_keep_the_user_s_style() -> None:
    with matplotlib.rc_context({"ytick.color": "red"}):
        ax = plot_heatmap(similarity().between("a", "b"), Figure().add_subplot())
        assert ax.get_yticklabels()[0].get_color() == "red"


def test_an_error_while_drawing_gives_the_settings_back() -> None:
    @own_settings()
    def fail() -> None:
        assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"]
        raise ZeroDivisionError

    with matplotlib.rc_context({"font.size": 40}):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert matplotlib.rcParams["font.size"] == 40
