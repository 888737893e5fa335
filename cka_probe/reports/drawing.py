"""matplotlib and seaborn, loaded and used so that the settings of whoever runs this have no say in the files drawn."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _load() -> None:
    """Import matplotlib, whatever its settings; what it says of them is its user's business, not ours.

    A backend that does not exist (``MPLBACKEND``), or a ``matplotlibrc`` that cannot be read, stops its import.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # Of a named pipe, matplotlib would wait for the content.
                if "matplotlib" not in sys.modules and _is_odd("matplotlibrc"):
                    raise OSError("matplotlibrc is no file")
                import seaborn  # which imports matplotlib and its pyplot
            except Exception:  # whatever it raises of settings that it cannot read
                if "matplotlib" in sys.modules:
                    raise
                for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "seaborn")]:
                    del sys.modules[name]  # half imported, they would lack their parts
                with _no_settings():
                    import seaborn  # noqa: F401
    finally:
        logger.setLevel(level)


def _is_odd(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)


@contextmanager
def _no_settings() -> Iterator[None]:
    """Within the block, matplotlib finds no settings but its own."""
    names = ("MPLBACKEND", "MATPLOTLIBRC")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "matplotlibrc"
        empty.touch()
        os.chdir(folder)  # it looks there first
        try:
            yield
        finally:
            os.chdir(here)
            os.environ.update(before)


_load()

import matplotlib.style  # noqa: E402
import seaborn as sns  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.cm import ScalarMappable  # noqa: E402
from matplotlib.colors import Normalize  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from cka_probe.runtime.names import readable  # noqa: E402

__all__ = [
    "Axes",
    "Figure",
    "FigureCanvasAgg",
    "MaxNLocator",
    "Normalize",
    "Rectangle",
    "ScalarMappable",
    "drawable",
    "own_settings",
    "sns",
]


_FONTS = {"pdf.fonttype": 42, "svg.fonttype": "none"}


def drawable(text: str) -> str:
    """A text with codes for the characters that no font has and no file of a picture takes."""
    return "\n".join(map(readable, text.split("\n")))


@contextmanager
def own_settings() -> Iterator[None]:
    """Within the block, pictures are drawn and saved with matplotlib's defaults; afterwards all is as it was.

    Except for fonts: text in a PDF is in TrueType, as publishers ask for, and text in an SVG stays text.
    """
    with warnings.catch_warnings(), matplotlib.style.context(["default", _FONTS]):
        warnings.simplefilter("ignore", UserWarning)  # of characters in names that no font has
        yield
