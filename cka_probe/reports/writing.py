"""Results -> the folder of a run: its files appear all together, or not at all; then its report is drawn."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import CkaProbeError, OutputError, SpecError
from cka_probe.reports.run_files import THUMBNAIL, Run, files_of_comparison, load_samples, named_files, read_comparison
from cka_probe.reports.tables import write_table
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.folder.run_folder import REPORT, RESULTS, RunFolder, kind_of
from cka_probe.runtime.names import utf8
from cka_probe.runtime.records import write_record


def write_report(
    results: Similarity | Mapping[str, Similarity] | Sequence[Similarity], out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write what `cka_probe.compare` returned, as ``cka-probe compare --out`` does: numbers, pictures, ``report.html``.

    Args:
        results: one similarity, or several measures of the same layers.
        out: a new or empty folder.
        overwrite: replace the files of an earlier run there; other files stay.

    Returns:
        ``report.html``.

    Raises:
        SpecError: there is no result, a measure stands twice, or the layers differ.
        OutputError: the folder cannot be written, or holds other files.
    """
    if isinstance(results, Similarity):
        results = [results]
    given = list(results.values() if isinstance(results, Mapping) else results)
    if not given:
        raise SpecError("A report needs at least one result of compare().")
    if len({similarity.measure for similarity in given}) < len(given):
        raise SpecError(f"Each measure may appear once, but got {[similarity.measure for similarity in given]}.")
    if any((similarity.rows, similarity.cols) != (given[0].rows, given[0].cols) for similarity in given):
        raise SpecError("All results of a report must have the same layers. Write a report for each comparison.")
    curve, influence = (any(getattr(one, name) for one in given) for name in ("curve", "influence"))
    writes = files_of_comparison(curve=curve, influence=influence)
    folder = RunFolder(out)
    folder.check_origin(overwrite=overwrite, writes=writes)
    with folder:
        folder.claim("compare", resume=False, overwrite=overwrite, writes=writes)
        write_comparison(folder, Run({similarity.measure: similarity for similarity in given}, {}, {}))
    return folder.path / "report.html"


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
    draw_into(folder, replace(run, samples=load_samples(folder.path, list(run.samples))))


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
        (
            *map(utf8, (one.example, one.row.model, one.row.name, one.col.model, one.col.name)),
            similarity.measure,
            one.change,
        )
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
    sheet = Image.new("RGB", (width * THUMBNAIL, len(samples) * THUMBNAIL))
    for row, images in enumerate(samples.values()):
        for column, pixels in enumerate(images):
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
            sheet.paste(image.resize((THUMBNAIL, THUMBNAIL)), (column * THUMBNAIL, row * THUMBNAIL))
    sheet.save(path)


def _found(results: Mapping[str, Similarity]) -> dict[str, Any]:
    """What the provenances say: once where they agree, and a mapping a measure where they do not."""
    records = {measure: similarity.provenance.as_record() for measure, similarity in results.items()}
    first, *others = records.values()
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    if not others:
        return common
    own = {
        measure: {key: value for key, value in record.items() if key not in common}
        for measure, record in records.items()
    }
    return {**common, "measures": own}
