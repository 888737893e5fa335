"""The folder of a finished comparison, read again; the names of its files; its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import DataError, OutputError
from cka_probe.images.sources.files import READ_ERRORS, read_image
from cka_probe.networks.models import base_of
from cka_probe.probing.stored_features import is_stored
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.files import reason
from cka_probe.runtime.folder.run_folder import RECORD, RunFolder
from cka_probe.runtime.names import file_names
from cka_probe.runtime.records import Shape, check, plain, read_mapping
from cka_probe.runtime.user_files import code_sha256, is_user_file

THUMBNAIL = 96
"""Height and width of an image in samples.png."""

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
    """The files that every comparison writes, and those that these options add."""
    pictures = [f"{name}.{suffix}" for name in ("heatmap", "profile") for suffix in ("png", "svg", "pdf")]
    more = [name for name, asked in (("curve.csv", curve), ("influence.csv", influence)) if asked]
    return [RECORD, "similarity.npz", "similarity.csv", "report.html", *pictures, *more]


def read_comparison(folder: Path) -> Run:
    """Read what `write_comparison` wrote.

    Raises:
        OutputError: the folder holds no finished comparison, or a file of it cannot be read.
    """
    if not (folder / "run.yaml").is_file() or not (folder / "similarity.npz").is_file():
        raise OutputError(f"A finished comparison must hold run.yaml and similarity.npz, but {folder} does not.")
    record = read_mapping(folder / "run.yaml")
    check(folder / "run.yaml", record, _RECORD)
    first = Similarity.load(folder / "similarity.npz")
    others: list[Similarity] = []
    for path in sorted(folder.glob("similarity.?*.npz")):
        other = Similarity.load(path)
        known = {similarity.measure for similarity in (first, *others)}
        if (other.rows, other.cols) != (first.rows, first.cols) or other.measure in known:
            raise OutputError(f"{path} must hold another measure of the layers in similarity.npz, but does not.")
        others.append(other)
    order = list((record.get("result") or {}).get("measures") or ())  # as they were asked for
    others.sort(key=lambda one: order.index(one.measure) if one.measure in order else len(order))
    results = {similarity.measure: similarity for similarity in (first, *others)}
    _check_panels(folder / "run.yaml", record.get("panels"), first)
    names = [one.name for one in first.provenance.subjects if one.stored is None]  # those that saw images
    return Run(results, {key: value for key, value in record.items() if key != "result"}, load_samples(folder, names))


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


def named_files(results: Mapping[str, Similarity]) -> Iterator[tuple[str, Similarity]]:
    """What stands before the suffix of each measure's files: nothing for the first, else its spec, ``-`` for ``:``."""
    names = file_names([measure.replace(":", "-") for measure in results])
    for index, (name, similarity) in enumerate(zip(names.values(), results.values(), strict=True)):
        yield (f".{name}" if index else ""), similarity


def load_samples(folder: Path, models: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """Model -> the images of ``samples.png``, (k, h, w, 3) uint8; empty where the file is not of these models.

    Raises:
        OutputError: it cannot be read.
    """
    path = folder / "samples.png"
    if not path.is_file():
        return {}
    try:
        sheet = np.asarray(read_image(path).convert("RGB"))
        if any(length % THUMBNAIL for length in sheet.shape[:2]):
            raise DataError(f"its sides must be multiples of {THUMBNAIL} pixels")
    except READ_ERRORS as error:
        raise OutputError(f"{path} cannot be read: {reason(error)}") from error
    rows, columns = (length // THUMBNAIL for length in sheet.shape[:2])
    if rows != len(models):
        return {}
    tiles = sheet.reshape(rows, THUMBNAIL, columns, THUMBNAIL, 3).swapaxes(1, 2)
    return dict(zip(models, tiles, strict=True))
