"""What the folder of a distillation says of it: options, outcome, metrics, stages, similarity."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cka_probe.checkpoint import DISTILLATION, LAST, PREVIOUS, load_checkpoint
from cka_probe.errors import OutputError
from cka_probe.runtime.run_folder import PRIVATE, kind_of
from cka_probe.similarity import Similarity

MOMENTS = {"before": "before", "choice": "at the choice", "after": "after"}
"""When student and teacher are compared: of the file similarity.WHEN.npz, and for a reader."""

_NO_PARTS = ("epoch", "updates", "lr", "loss", "top1", "top5", "top1_ema", "images_per_second")


@dataclass(frozen=True)
class Record:
    """A distillation as its folder holds it, finished or not.

    Attributes:
        command: that repeats it.
        options: name -> value.
        result: of run.yaml; empty where the run is not finished.
        metrics: a row an epoch; a value that is not there is None.
        stages: of stages.yaml; empty where the method has none.
        similarities: of `MOMENTS`, the student's layers along the rows and the teacher's along the columns.
    """

    command: str
    options: Mapping[str, Any]
    result: Mapping[str, Any]
    metrics: tuple[Mapping[str, float | None], ...]
    stages: Mapping[str, Any]
    similarities: Mapping[str, Similarity]

    @property
    def parts(self) -> list[str]:
        """Columns of the metrics that are parts of the loss."""
        return [name for name in self.columns if name not in _NO_PARTS]

    @property
    def columns(self) -> list[str]:
        """Of the metrics."""
        return list(self.metrics[0]) if self.metrics else []

    def column(self, name: str) -> list[float | None]:
        """A value an epoch."""
        return [row[name] for row in self.metrics]

    @property
    def chosen_layers(self) -> list[str]:
        """The student's layers that got a branch or were matched."""
        return [row["layer"] for row in self.stages.get("stages", []) if row["chosen"]]

    @property
    def matches(self) -> list[tuple[str, str]]:
        """Pairs of a chosen layer of the student and the teacher's that it was matched with, where one was."""
        if "pairs" in self.stages:
            return [(own, other) for own, other in self.stages["pairs"]]
        rows = self.stages.get("stages", [])
        return [(row["layer"], row["match"]) for row in rows if row["chosen"] and row.get("match")]


def holds_distillation(folder: Path) -> bool:
    """Whether a folder is that of a distillation, finished or not."""
    kind = kind_of(folder)
    if kind is not None:
        return kind == "distill"
    return any((folder / name).is_file() for name in ("metrics.csv", LAST, PREVIOUS))  # of version 0.1


def read_record(folder: Path) -> Record:
    """Read the folder of a distillation; of one that is not finished, what there is.

    Raises:
        OutputError: a file of it cannot be read.
        CheckpointError: it is not finished, and its checkpoints are damaged.
    """
    record = _yaml(folder / "run.yaml") or _unfinished(folder)
    try:
        return Record(
            str(record["command"]),
            dict(record["options"]),
            dict(record["result"]),
            _metrics(folder / "metrics.csv"),
            _yaml(folder / "stages.yaml"),
            _similarities(folder),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise OutputError(
            f"The files of {folder} must be as cka-probe distill wrote them, but are not: {error!r}"
        ) from error


def _unfinished(folder: Path) -> dict[str, Any]:
    state = load_checkpoint(folder / PRIVATE if kind_of(folder) is not None else folder, DISTILLATION)
    if state is None:
        raise OutputError(f"The folder of a distillation must hold run.yaml or a checkpoint, but {folder} holds none.")
    taught = state["teacher"]
    return {**state, "options": state["config"], "result": {"teacher_top1": taught[1]} if taught else {}}


def _yaml(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there."""
    import yaml

    if not path.is_file():
        return {}
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} must hold the record of a run, but holds {type(record).__name__}.")
    return record


def _metrics(path: Path) -> tuple[dict[str, float | None], ...]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        return tuple({name: float(v) if v else None for name, v in row.items()} for row in csv.DictReader(file))


def _similarities(folder: Path) -> dict[str, Similarity]:
    found = {}
    for when in MOMENTS:
        path = folder / f"similarity.{when}.npz"
        if path.is_file():
            joint = Similarity.load(path)
            student, teacher = joint.models
            found[when] = joint.between(student, teacher)
    return found
