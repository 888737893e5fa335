"""words.npz of a distillation by visual words: written, read, and drawn."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import OutputError
from cka_probe.runtime.files import reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = "words.npz"


@dataclass(frozen=True)
class PicturedWords:
    """Some words, those that are nearest to the most locations first.

    Attributes:
        level: the layer of their maps.
        shares: (words,) of the locations that each is the nearest word of, from 0 to 1.
        patches: (words, patches, rows, columns, channels) uint8, the nearest first, each of another image.
    """

    level: str
    shares: NDArray[np.float64]
    patches: NDArray[np.uint8]


def save_words(words: PicturedWords, path: Path) -> None:
    """Write them as an npz file."""
    with path.open("wb") as file:
        np.savez_compressed(file, level=np.array(words.level), shares=words.shares, patches=words.patches)


def load_words(path: Path) -> PicturedWords | None:
    """What `save_words` wrote; None where there is no file.

    Raises:
        OutputError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            words = PicturedWords(str(file["level"]), file["shares"], file["patches"])
        if words.patches.ndim != 5 or words.patches.dtype != np.uint8 or words.shares.shape != words.patches.shape[:1]:
            raise ValueError("its patches are none")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise OutputError(f"{path} cannot be read: {reason(error)}") from error
    return words


def plot_words(words: PicturedWords) -> Figure:
    """A row a word: its share of the locations, and its nearest patches, the nearest first."""
    from cka_probe.reports.drawing import Figure, FigureCanvasAgg

    count, patches = words.patches.shape[:2]
    figure = Figure(figsize=(0.6 * patches + 1, 0.6 * count + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, patches, squeeze=False)
    for row, (share, strip) in enumerate(zip(words.shares, words.patches, strict=True)):
        for ax, patch in zip(axes[row], strip, strict=True):
            ax.imshow(patch.squeeze(-1) if patch.shape[-1] == 1 else patch, cmap="gray", vmin=0, vmax=255)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[row, 0].set_ylabel(f"{share:.1%}", rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle(f"Visual words of {words.level}, each with its nearest patches", fontsize=8)
    return figure
