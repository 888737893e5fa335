"""The rows of metrics.csv as event files, for TensorBoard."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cka_probe.errors import SpecError

FOLDER = "tensorboard"
"""Of the event files, below that of the run."""

_TAGS = {
    "loss": "loss/total",
    "top1": "accuracy/top1",
    "top5": "accuracy/top5",
    "top1_ema": "accuracy/top1_ema",
    "lr": "training/lr",
    "updates": "training/updates",
    "images_per_second": "training/images_per_second",
}
"""Of the columns of metrics.csv; the others are parts of the loss."""

Row = Mapping[str, Any]


def check_installed() -> None:
    """Raise a SpecError where TensorBoard's package is missing: it is asked before the training, not in it."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise SpecError(
            f"--tensorboard needs the package tensorboard, which cannot be imported: {error}. Install it by "
            "pip install 'cka-probe[tensorboard]'."
        ) from error


@contextmanager
def event_files(out: Path | None) -> Iterator[Callable[[Row], None]]:
    """What adds a row of the metrics, its epoch as the step, to an event file of the run in ``out``; nothing if None.

    Files of before are taken away: a run that goes on adds its earlier rows anew, so that no step is there twice.
    """
    if out is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    clear_events(out)
    writer = SummaryWriter(str(out / FOLDER))

    def add(row: Row) -> None:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(_TAGS.get(name, f"loss/{name}"), value, row["epoch"])
        writer.flush()

    try:
        yield add
    finally:
        writer.close()


def clear_events(out: Path) -> None:
    """Take the event files of a run away."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
