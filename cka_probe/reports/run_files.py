"""The folder of a finished run: its files appear all together, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import CkaProbeError, DataError, OutputError
from cka_probe.images.sources.files import READ_ERRORS, read_image
from cka_probe.networks.models import base_of
from cka_probe.probing.stored_features import is_stored
from cka_probe.reports.tables import write_table
from cka_probe.results.similarity import Similarity
from cka_probe.results.stored import load_similarity
from cka_probe.runtime.files import reason
from cka_probe.runtime.folder.run_folder import RECORD, REPORT, RESULTS, RunFolder, kind_of
from cka_probe.runtime.names import file_names
from cka_probe.runtime.records import Shape, check, plain, read_mapping, write_record
from cka_probe.runtime.user_files import code_sha256, is_user_file

_THUMBNAIL = 96
_WITHOUT_EFFECT = ("out", "scratch", "resume", "overwrite", "checkpoint_minutes", "workers")  # options, on the result

_RECORD: Shape = {
    "command?": (str, None), "panels?": ({"pairs": [[str, str]], "columns?": (int, None)}, None),
    "result?": ({"measures?": ({str: object}, None)}, None),
}  # fmt: skip
"""What drawing a run again takes from run.yaml; the numbers come from the files beside it."""


@dataclass(frozen=True)
class Run:
    """A finished comparison, as its folder holds it.

    Attributes:
        results: measure -> similarity, the first being the one that the plain file names belong to.
        record: command and options, and the arrangement of the panels (``panels``) where it is not the usual one.
        samples: model -> the first images as it saw them, (k, h, w, c) uint8; empty where they are not known.
    """

    results: Mapping[str, Similarity]
    record: Mapping[str, Any]
    samples: Mapping[str, NDArray[np.uint8]]


def is_finished(folder: RunFolder, options: Mapping[str, Any]) -> bool:
    """Whether a folder holds the finished run of these options, so that there is nothing to resume.

    Args:
        folder: of the run, entered.
        options: as `write_record` gets them; those that do not change a result are not compared.
    """
    if folder.state != "finished" or not folder.holds(RECORD):
        return False
    try:
        record = read_mapping(folder.path / RECORD)
    except OutputError:
        return False
    before, now = record.get("options"), plain(options)
    same = isinstance(before, dict) and all(
        before.get(name) == value for name, value in now.items() if name not in _WITHOUT_EFFECT
    )
    return same and _code_in(record.get("result")) == _code_of(options["models"])


def _code_in(result: Any) -> set[str]:
    """The hashes of the users' files that made a result."""
    subjects = result.get("subjects") if isinstance(result, dict) else None
    return {str(one["code_sha256"]) for one in subjects or () if isinstance(one, dict) and "code_sha256" in one}


def _code_of(models: Sequence[str]) -> set[str]:
    """The hashes of the files of the users' own networks among model specs."""
    bases = (base_of(spec) for spec in models if not is_stored(spec))
    return {code_sha256(base) for base in bases if is_user_file(base)}


def files_of_comparison(*, curve: bool, influence: bool) -> list[str]:
    """The files that `write_comparison` writes for certain, and those that these options add."""
    pictures = [f"{name}.{suffix}" for name in ("heatmap", "profile") for suffix in ("png", "svg", "pdf")]
    more = [name for name, asked in (("curve.csv", curve), ("influence.csv", influence)) if asked]
    return [RECORD, "similarity.npz", "similarity.csv", "report.html", *pictures, *more]


def write_comparison(folder: RunFolder, run: Run) -> None:
    """Write the results of a comparison and its record, and then draw it: a picture that fails loses no number.

    Args:
        folder: of the run, entered. What an earlier run wrote there is replaced.
        run: the first measure takes the plain names; another stands before the suffix:
            ``similarity.cka-rbf-0.8.npz``.

    Raises:
        OutputError: the folder cannot be written, or the pictures cannot be drawn.
    """
    import pandas as pd

    with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="compare") as stage:
        for infix, similarity in named_files(run.results):
            similarity.save(stage / f"similarity{infix}.npz")
        table = pd.concat([similarity.to_frame() for similarity in run.results.values()])
        write_table(stage / "similarity.csv", table)
        _save_curves(stage, run.results.values())
        _save_influence(stage, run.results.values())
        if run.samples:
            _save_samples(stage / "samples.png", run.samples)
        write_record(stage, {**run.record, "result": _found(run.results)})
    # The samples as they can be read again, so that the report can be drawn again the same.
    draw_into(folder, replace(run, samples=_load_samples(folder.path, list(run.samples))))


def draw_into(folder: RunFolder, run: Run) -> None:
    """Draw the pictures and the report of a comparison into its folder.

    Raises:
        OutputError: they cannot be drawn; the results are there.
    """
    from cka_probe.reports.report import draw

    folder.check_free(folder.names(REPORT))
    with drawing(folder) as stage:
        draw(stage, run)


@contextmanager
def drawing(folder: RunFolder) -> Iterator[Path]:
    """A folder to draw into, for the report part of a run's folder; whatever goes wrong says where the results are."""
    alone = folder.state in ("vacant", "foreign")  # no run is here, only what is drawn of one
    try:
        with folder.together(REPORT, replaces=(REPORT,), kind="report" if alone else None) as stage:
            yield stage
    except CkaProbeError as error:
        if alone or not isinstance(error.__cause__, OSError):
            raise
        raise OutputError(f"{_undrawn(folder)}: {error} {_again(folder)}") from error
    except Exception as error:  # Matplotlib, fonts and templates may raise anything; the numbers are written
        raise OutputError(f"{_undrawn(folder)}: {type(error).__name__}: {error}. {_again(folder)}") from error


def _undrawn(folder: RunFolder) -> str:
    return f"The results are in {folder.path}, but they could not be drawn"


def _again(folder: RunFolder) -> str:
    return f"Draw them again: cka-probe report {folder.path}"


def read_comparison(folder: Path) -> Run:
    """Read what `write_comparison` wrote.

    Raises:
        OutputError: the folder holds no finished comparison, or a file of it cannot be read.
    """
    if not (folder / "run.yaml").is_file() or not (folder / "similarity.npz").is_file():
        raise OutputError(f"A finished comparison must hold run.yaml and similarity.npz, but {folder} does not.")
    record = read_mapping(folder / "run.yaml")
    check(folder / "run.yaml", record, _RECORD)
    first = load_similarity(folder / "similarity.npz")
    others: list[Similarity] = []
    for path in sorted(folder.glob("similarity.?*.npz")):
        other = load_similarity(path)
        known = {similarity.measure for similarity in (first, *others)}
        if (other.rows, other.cols) != (first.rows, first.cols) or other.measure in known:
            raise OutputError(f"{path} must hold another measure of the layers in similarity.npz, but does not.")
        others.append(other)
    order = list((record.get("result") or {}).get("measures") or ())  # as they were asked for
    others.sort(key=lambda one: order.index(one.measure) if one.measure in order else len(order))
    results = {similarity.measure: similarity for similarity in (first, *others)}
    _check_panels(folder / "run.yaml", record.get("panels"), first)
    names = [s["name"] for s in first.provenance.get("subjects", []) if "stored" not in s]  # those that saw images
    return Run(results, {key: value for key, value in record.items() if key != "result"}, _load_samples(folder, names))


def _check_panels(path: Path, panels: Mapping[str, Any] | None, similarity: Similarity) -> None:
    """Raise an OutputError where the arrangement of the panels names other models than the similarity."""
    if not (similarity.rows and similarity.cols):
        raise OutputError(f"{path.with_name('similarity.npz')} must hold one layer or more, but holds none.")
    rows, cols = ({layer.model for layer in side} for side in (similarity.rows, similarity.cols))
    if panels is not None and (not panels["pairs"] or (panels.get("columns") or 1) < 1):
        raise OutputError(f"{path} must arrange one panel or more, in one column or more.")
    for pair in panels["pairs"] if panels is not None else ():
        if not set(pair) <= rows & cols:
            names = ", ".join(similarity.models)
            raise OutputError(f"{path} arranges a panel of {' and '.join(pair)}, but the models are {names}.")


def redraw(folder: Path, out: RunFolder | None = None) -> Path:
    """Draw the pictures and the report of a finished comparison again.

    Args:
        folder: of the comparison.
        out: where to draw, entered; by default in the folder itself: see `report_home`.

    Returns:
        Where they are.

    Raises:
        OutputError: the folder holds no finished comparison, or cannot be written.
    """
    run = read_comparison(folder)
    with nullcontext(out) if out is not None else RunFolder(report_home(folder), option="the folder") as home:
        draw_into(home, run)
    return home.path


def report_home(folder: Path) -> Path:
    """Where a run is drawn again: in its folder; in a new one below it, where no manifest lists what it holds."""
    if kind_of(folder) is not None:
        return folder
    names = (f"report{f'-{number}' if number else ''}" for number in count())
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def write_difference(folder: RunFolder, before: Path, after: Path) -> None:
    """Draw what changed between two finished comparisons of the same layers, and write it as a table.

    Args:
        folder: for the pictures and the table, entered.
        before: a finished comparison.
        after: one of the same layers.

    Raises:
        OutputError: a folder holds no finished comparison, or ``folder`` cannot be written.
        SpecError: their layers differ, or they have no measure in common.
    """
    from cka_probe.reports.difference import draw_difference

    first, second = read_comparison(before), read_comparison(after)
    with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="difference") as stage:
        draw_difference(stage, first, second, names=(str(before), str(after)))


def named_files(results: Mapping[str, Similarity]) -> Iterator[tuple[str, Similarity]]:
    """What stands before the suffix of each measure's files: nothing for the first, else its spec, ``-`` for ``:``."""
    names = file_names([measure.replace(":", "-") for measure in results])
    for index, (name, similarity) in enumerate(zip(names.values(), results.values(), strict=True)):
        yield (f".{name}" if index else ""), similarity


def _save_curves(folder: Path, results: Iterable[Similarity]) -> None:
    """``curve.csv``, where there are curves: a row a cell and number of examples."""
    import pandas as pd

    curves = [similarity.curve_frame() for similarity in results if similarity.curve is not None]
    if curves:
        write_table(folder / "curve.csv", pd.concat(curves))


def _save_influence(folder: Path, results: Iterable[Similarity]) -> None:
    """``influence.csv``, where it was asked for: a row an image and pair of models, those that move most first."""
    import pandas as pd

    rows = [
        (one.example, one.row.model, one.row.name, one.col.model, one.col.name, similarity.measure, one.change)
        for similarity in results
        for one in similarity.influence
    ]
    if rows:
        columns = ["image", "row_model", "row_layer", "col_model", "col_layer", "measure", "change"]
        write_table(folder / "influence.csv", pd.DataFrame(rows, columns=columns))


def _save_samples(path: Path, samples: Mapping[str, NDArray[np.uint8]]) -> None:
    """One picture: a row of thumbnails for each model."""
    from PIL import Image

    width = max(len(images) for images in samples.values())
    sheet = Image.new("RGB", (width * _THUMBNAIL, len(samples) * _THUMBNAIL))
    for row, images in enumerate(samples.values()):
        for column, pixels in enumerate(images):
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
            sheet.paste(image.resize((_THUMBNAIL, _THUMBNAIL)), (column * _THUMBNAIL, row * _THUMBNAIL))
    sheet.save(path)


def _load_samples(folder: Path, models: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    path = folder / "samples.png"
    if not path.is_file():
        return {}
    try:
        sheet = np.asarray(read_image(path).convert("RGB"))
        if any(length % _THUMBNAIL for length in sheet.shape[:2]):
            raise DataError(f"its sides must be multiples of {_THUMBNAIL} pixels")
    except READ_ERRORS as error:
        raise OutputError(f"{path} cannot be read: {reason(error)}") from error
    rows, columns = (length // _THUMBNAIL for length in sheet.shape[:2])
    if rows != len(models):
        return {}
    tiles = sheet.reshape(rows, _THUMBNAIL, columns, _THUMBNAIL, 3).swapaxes(1, 2)
    return dict(zip(models, tiles, strict=True))


def _found(results: Mapping[str, Similarity]) -> dict[str, Any]:
    """What the provenances say: once where they agree, and a mapping a measure where they do not."""
    first, *others = (similarity.provenance for similarity in results.values())
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    if not others:
        return common
    own = {
        measure: {key: value for key, value in similarity.provenance.items() if key not in common}
        for measure, similarity in results.items()
    }
    return {**common, "measures": own}
