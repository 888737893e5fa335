"""The rows of metrics.csv as event files, for TensorBoard."""

from __future__ import annotations

import importlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from cka_probe.distill.training.progress import is_part
from cka_probe.errors import SpecError
from cka_probe.runtime.folder.run_folder import RunFolder

FOLDER = "tensorboard"
"""Of the event files, below that of the run."""

EVENTS = "events"
"""The part of the run's folder that they are."""

_TAGS = {
    "loss": "loss/total",
    "train_top1": "accuracy/train_top1",
    **{
        f"{part}_{column}": f"accuracy/{part}_{column}"
        for part in ("validation", "test")
        for column in ("top1", "top5", "top1_ema", "knn")
    },
    "lr": "training/lr",
    "updates": "training/updates",
    "images_per_second": "training/images_per_second",
}
"""Of columns of metrics.csv; the others are parts of the loss, or accuracies of networks that the method scores."""

Row = Mapping[str, Any]


def _tag(column: str) -> str:
    return _TAGS.get(column) or f"{'loss' if is_part(column) else 'accuracy'}/{column}"


def check_installed() -> None:
    """Raise a SpecError where TensorBoard's package is missing: before the training, not in it."""
    try:
        importlib.import_module("tensorboard.summary.writer.record_writer")
    except ImportError as error:
        raise SpecError(
            f"--tensorboard needs the package tensorboard, which cannot be imported: {error}. Install it by "
            "pip install 'cka-probe[tensorboard]'."
        ) from error


@contextmanager
def event_files(folder: RunFolder | None) -> Iterator[Callable[[Row], None]]:
    """A function that adds a row of the metrics, its epoch as the step, to an event file of the run; nothing if None.

    Earlier event files are removed: a resumed run adds its earlier rows again, so that no step is there twice.
    """
    if folder is None:
        yield lambda row: None
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    # The writer of torch.utils.tensorboard chooses the file's name itself, so that nobody could list it before.
    file: IO[bytes] | None = None
    name = f"{FOLDER}/events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"

    def write(**what: Any) -> None:
        assert file is not None
        RecordWriter(file).write(Event(wall_time=time.time(), **what).SerializeToString())

    def add(row: Row) -> None:
        nonlocal file
        if file is None:
            folder.remove(EVENTS)
            file = folder.growing(name, part=EVENTS).open("ab")
            write(file_version="brain.Event:2")
        values = [
            Summary.Value(tag=_tag(column), simple_value=value) for column, value in row.items() if column != "epoch"
        ]
        for value in values:
            write(step=row["epoch"], summary=Summary(value=[value]))
        file.flush()
        folder.grown(name)

    try:
        yield add
    finally:
        if file is not None:
            file.close()
