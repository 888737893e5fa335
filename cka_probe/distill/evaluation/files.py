"""The files of an evaluation: the table, and for each network accuracy by class and confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any

import pandas as pd

from cka_probe.distill.evaluation.score import Score
from cka_probe.errors import OutputError
from cka_probe.images.broken import broken_record
from cka_probe.networks.specs import ModelSpec
from cka_probe.reports.tables import write_table
from cka_probe.runtime.folder.run_folder import RECORD, REPORT, RESULTS, RunFolder
from cka_probe.runtime.names import file_names, utf8
from cka_probe.runtime.provenance import versions
from cka_probe.runtime.records import write_record
from cka_probe.runtime.world import World

TABLE, BY_CLASS = "accuracy.csv", "per-class.csv"


def files_of_evaluation(specs: Sequence[str], *, per_class: bool) -> list[str]:
    """The files that `write_evaluation` writes."""
    stems = _stems([ModelSpec.parse(spec).name for spec in specs]).values()
    more = [BY_CLASS, *(f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "png"))]
    return [RECORD, TABLE, *(more if per_class else ())]


def write_evaluation(
    folder: RunFolder, scores: Sequence[Score], record: Mapping[str, Any], world: World, *, per_class: bool
) -> None:
    """Write the results of an evaluation, and then the pictures: one that cannot be drawn loses no number.

    Args:
        folder: of the run, entered and claimed.
        scores: of the networks.
        record: command and options.
        world: the processes that ran.
        per_class: write accuracy by class and the confusion matrices too.

    Raises:
        OutputError: the folder cannot be written, or a picture cannot be drawn.
    """
    stems = _stems([score.name for score in scores])
    with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="evaluate") as stage:
        write_table(stage / TABLE, pd.DataFrame([_row(score) for score in scores]))
        if per_class:
            write_table(stage / BY_CLASS, pd.DataFrame([row for score in scores for row in by_class(score)]))
            for score in scores:
                write_table(stage / f"{stems[score.name]}.csv", _matrix(score))
        write_record(stage, {**record, "result": _result(scores, world)})
    if per_class:
        _draw(folder, scores, stems)


def by_class(score: Score) -> list[dict[str, Any]]:
    """A row a class: images, accuracy with its 95% interval, and the class that it is mistaken for most."""
    names, rows = columns(score), []
    for number, (accuracy, counts) in enumerate(zip(score.by_class(), score.confusion, strict=True)):
        wrong = counts.copy()
        wrong[number] = 0
        most = int(wrong.argmax())
        known = accuracy.images > 0
        low, high = accuracy.interval() if known else (None, None)
        rows.append(
            {
                "network": utf8(score.name),
                "class": utf8(score.classes[number]),
                "images": accuracy.images,
                "right": int(counts[number]),
                "accuracy": accuracy.top1 if known else None,
                "low": low,
                "high": high,
                "mistaken_for": utf8(names[most]) if wrong[most] else "",
                "mistaken": int(wrong[most]),
            }
        )
    return rows


def columns(score: Score) -> list[str]:
    """The names of the columns of the confusion matrix."""
    return [*score.classes, *(["(another class)"] if score.confusion.shape[1] > len(score.classes) else [])]


def _stems(names: Sequence[str]) -> dict[str, str]:
    """Network -> the name of the files of its confusion matrix, without a suffix; its own where there is one network.

    >>> _stems(["zoo:cnn"]), _stems(["a", "b"])
    ({'zoo:cnn': 'confusion'}, {'a': 'confusion.a', 'b': 'confusion.b'})
    """
    if len(names) == 1:
        return {names[0]: "confusion"}
    return {name: f"confusion.{stem}" for name, stem in file_names(names).items()}


def _row(score: Score) -> dict[str, Any]:
    low, high = score.accuracy.interval()
    row = {"network": utf8(score.name), "top1": score.top1, "low": low, "high": high}
    if score.has_top5:
        row["top5"] = score.top5
    if score.by != "logits":
        row["by"] = score.by
    return {**row, "images": score.accuracy.images}


def _matrix(score: Score) -> pd.DataFrame:
    """The confusion matrix: a row a class, its name first, and a column a predicted class."""
    table: pd.DataFrame = pd.DataFrame(score.confusion, columns=list(map(utf8, columns(score))))
    table.insert(0, "true \\ predicted", list(map(utf8, score.classes)), allow_duplicates=True)
    return table


def _result(scores: Sequence[Score], world: World) -> dict[str, Any]:
    measured = scores[0].images
    return {
        "data": {
            "source": measured.images.name,
            "part": measured.part,
            "images": len(measured.images),
            "classes": len(measured.classes),
            **broken_record(measured.broken),
        },
        "networks": [
            {
                **_row(score),
                **score.source,
                "classes": score.matched,
                "preprocessing": asdict(score.sees),
            }
            for score in scores
        ],
        "processes": world.size,
        "device": str(world.device),
        "versions": versions(),
    }


def _draw(folder: RunFolder, scores: Sequence[Score], stems: Mapping[str, str]) -> None:
    from cka_probe.distill.evaluation.confusion import save_confusion
    from cka_probe.reports.drawing import own_settings

    try:
        with folder.together(REPORT, replaces=(REPORT,)) as stage, own_settings():
            for score in scores:
                save_confusion(score, stage / f"{stems[score.name]}.png")
    except OutputError:
        raise
    except Exception as error:  # Matplotlib and fonts may raise anything; the numbers are written
        raise OutputError(
            f"The results are in {folder.path}, but the confusion matrix could not be drawn: "
            f"{type(error).__name__}: {error}"
        ) from error


def lowest(score: Score, count: int = 5) -> list[dict[str, Any]]:
    """The rows of `by_class` with the lowest accuracies below 1, the lowest first; classes without images left out."""
    known = [row for row in by_class(score) if row["accuracy"] is not None and not isnan(row["accuracy"])]
    return sorted((row for row in known if row["accuracy"] < 1), key=lambda row: row["accuracy"])[:count]
