"""What the folder of a distillation says of it: options, outcome, metrics, stages, similarity."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cka_probe.distill.methods import METHODS
from cka_probe.distill.outputs.words import WORDS, PicturedWords, load_words
from cka_probe.distill.training.progress import is_part
from cka_probe.errors import OutputError, SpecError
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.files import reason
from cka_probe.runtime.folder.checkpoint import DISTILLATION, LAST, PREVIOUS, load_checkpoint
from cka_probe.runtime.folder.run_folder import PRIVATE, kind_of
from cka_probe.runtime.records import Optional, Shape, check, read_mapping

MOMENTS = {"before": "before", "choice": "at the choice", "after": "after"}
"""When student and teacher are compared: of the file similarity.WHEN.npz, and for a reader."""

_HELD_OUT = ("top1", "top1_ema", "top5", "knn")  # of version 0.1, on the images that are reported on


_SIDE: Shape = (
    {"name": str, "spec?": Optional, "weights?": Optional, "parameters": int, "sees": [int, int, int]}, None,
)  # fmt: skip
_RECORD: Shape = {
    "command": str,
    "options": {
        "student": str, "teacher?": (str, None), "data": str, "method": str, "stages?": str, "similarity?": (str, None),
        "epochs": int, "probe_epochs?": int, "batch_size": int, "accumulate": int, "branch_budget?": float,
        "ema": (float, None), "optimizer": Optional, "lr": Optional, "weight_decay": Optional, "schedule": Optional,
        "seed": Optional,
    },
    "result": {},
}  # fmt: skip
_GUARD: Shape = ({"part": str, "images": int, "top1": float}, None)
_RESULT: Shape = {"teacher_top1?": (float, None), "images?": {str: int}, "teacher_guard?": _GUARD}
_ENDED: dict[str, Shape] = {
    "held_out?": int, "teacher_top1?": (float, None), "images?": {str: int}, "teacher_guard?": _GUARD,
    "weights?": str, "epochs?": int, "validation_top1?": (float, None),
    "best?": ({"file": str, "epoch": int, "weights": str, "validation_top1": float, "top1": float}, None),
    "student": _SIDE, "teacher?": _SIDE, "processes?": int, "device?": Optional, "finished?": Optional,
    "versions?": {str: Optional}, "seconds": float, "probe_seconds": float,
}  # fmt: skip
_FINISHED: Shape = {**_ENDED, "top1": float, "top1_interval": [float, float], "top5": (float, None)}
_WITHOUT_LABELS: Shape = {
    **_ENDED,
    "knn": ({"top1": float, "interval": [float, float], "images": int, "neighbours": int, "known": int}, None),
}
_STAGES: Shape = {
    "rule": str, "chosen": [int], "scores_differ?": bool, "part?": str, "pairs?": [[str, str]],
    "parameters?": {"student": int, "chosen_branches?": int, "all_branches?": int, "l2g?": int},
    "stages": [
        {
            "stage": int, "layer": str, "chosen": bool, "reason": str, "parameters?": int,
            "milliseconds_a_step?": float, "match?": (str, None),
        }
    ],
    "first?": str, "why_first?": str,
    "candidates?": [
        {
            "stages": [int], "layers": [str], "similarity": (float, None), "std_error": (float, None), "chosen": bool,
            "reason": str,
        }
    ],
}  # fmt: skip
_SCORED: Shape = {"similarity": (float, None), "std_error": (float, None), "match": (str, None)}


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
        words: visual words with their nearest patches; None where the method has none.
        further: by the names of further networks of the method: student and network, network and teacher.
    """

    command: str
    options: Mapping[str, Any]
    result: Mapping[str, Any]
    metrics: tuple[Mapping[str, float | None], ...]
    stages: Mapping[str, Any]
    similarities: Mapping[str, Similarity]
    further: Mapping[str, tuple[Similarity, Similarity]] = field(default_factory=dict)
    words: PicturedWords | None = None

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return "top1" in self.result or "knn" in self.result

    @property
    def parts(self) -> list[str]:
        """Columns of the metrics that are parts of the loss."""
        return [name for name in self.columns if is_part(name)]

    @property
    def accuracies(self) -> list[str]:
        """Columns of the metrics that are accuracies on images that were not trained on."""
        named = [f"{part}_{name}" for part in ("validation", "test") for name in _HELD_OUT]
        known = [name for name in (*named, *_HELD_OUT) if name in self.columns]
        return known + [name for name in self.columns if name not in known and "_top1_" in name]

    @property
    def by_neighbours(self) -> bool:
        """Whether these are of nearest neighbours: the training uses no labels."""
        return any(name.endswith("_knn") for name in self.columns)

    @property
    def measured(self) -> str:
        """The part of the data that these are of; empty before the first epoch has ended."""
        first = next(iter(self.accuracies), "")
        return "validation" if first.startswith("validation_") else "test" if first else ""

    @property
    def counts(self) -> dict[str, int]:
        """How many images each part of the data has, as far as it is known."""
        result = self.result
        return (
            dict(result["images"])
            if "images" in result
            else {"test": result["held_out"]}
            if "held_out" in result
            else {}
        )

    @property
    def teacher_line(self) -> float | None:
        """The teacher's top-1 on the images of `measured`, where it is known."""
        guard = self.result.get("teacher_guard")
        if self.measured == "validation":
            return guard["top1"] if guard and guard["part"] == "validation" else None
        taught: float | None = self.result.get("teacher_top1")
        return taught

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
    path = folder / "run.yaml"
    record = _yaml(path) or _unfinished(folder)
    check(path, record, _RECORD)
    result = record["result"]
    check(path, result, _FINISHED if "top1" in result else _WITHOUT_LABELS if "knn" in result else _RESULT, "result")
    return Record(
        record["command"],
        record["options"],
        record["result"],
        _metrics(folder / "metrics.csv"),
        _stages(folder / "stages.yaml"),
        _similarities(folder),
        _further(folder, record["options"]["method"]),
        load_words(folder / WORDS),
    )


def _unfinished(folder: Path) -> dict[str, Any]:
    state = load_checkpoint(folder / PRIVATE if kind_of(folder) is not None else folder, DISTILLATION)
    if state is None:
        raise OutputError(f"The folder of a distillation must hold run.yaml or a checkpoint, but {folder} holds none.")
    result: dict[str, Any] = {"teacher_guard": state["guard"]} if state.get("guard") else {}
    if state.get("images"):
        result["images"] = state["images"]
    if state.get("teacher"):  # of version 0.1
        result["teacher_top1"] = state["teacher"][1]
    return {**state, "options": state["config"], "result": result}


def _yaml(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where it is not there."""
    return read_mapping(path) if path.is_file() else {}


def _stages(path: Path) -> dict[str, Any]:
    record = _yaml(path)
    if not record:
        return {}
    check(path, record, _STAGES)
    rows = record["stages"]
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise OutputError(f"{path} must hold stages that are all described alike, but does not.")
    if record.get("parameters", {"student": 1})["student"] < 1:
        raise OutputError(f"{path} must hold the number of the student's parameters, but holds none.")
    if "similarity" in rows[0]:
        check(path, rows, [_SCORED], "stages")
    return record


def _metrics(path: Path) -> tuple[dict[str, float | None], ...]:
    if not path.is_file():
        return ()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{name: float(v) if v else None for name, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise OutputError(f"{path} cannot be read: {reason(error)}") from error
    columns = set(rows[0] if rows else ())
    missing = sorted({"epoch", "lr", "images_per_second"} - columns)
    if rows and (missing or None in rows[0]):
        raise OutputError(f"{path} must have a column for each value, but lacks {', '.join(missing) or 'a name'}.")
    return tuple({name: v if v is None or math.isfinite(v) else None for name, v in row.items()} for row in rows)


def _similarities(folder: Path) -> dict[str, Similarity]:
    found: dict[str, Similarity] = {}
    for when in MOMENTS:
        path = folder / f"similarity.{when}.npz"
        if not path.is_file():
            continue
        joint = Similarity.load(path)
        if len(joint.models) != 2:
            raise OutputError(f"{path} must hold two models, but holds {len(joint.models)}.")
        try:
            found[when] = joint.between(*joint.models)
        except SpecError as error:
            raise OutputError(f"{path} must hold a student along the rows and a teacher along the columns.") from error
        first = next(iter(found.values()))
        if (found[when].rows, found[when].cols) != (first.rows, first.cols):
            raise OutputError(f"{path} must hold the same layers as the comparison before it, but does not.")
    return found


def _further(folder: Path, method: str) -> dict[str, tuple[Similarity, Similarity]]:
    """The comparisons with further networks, which stand between the student and the teacher in the file."""
    found = {}
    for name in METHODS[method].networks if method in METHODS else ():
        path = folder / f"similarity.{name}.npz"
        if not path.is_file():
            continue
        joint = Similarity.load(path)
        if len(joint.models) != 3 or joint.models[1] != name:
            raise OutputError(f"{path} must hold a student, {name!r} and a teacher, but holds {joint.models}.")
        student, _, teacher = joint.models
        found[name] = joint.between(student, name), joint.between(name, teacher)
    return found
