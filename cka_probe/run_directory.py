"""The folder of a finished run: its files appear all together, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import OutputError
from cka_probe.partial import holds_partial
from cka_probe.similarity import Similarity

PICTURES = ("heatmap", "atlas", "profile", "curve", "difference", "layers", "layers-*")
_THUMBNAIL = 96
_WITHOUT_EFFECT = ("out", "cache", "resume", "overwrite", "checkpoint_minutes", "workers")  # options, on the result

_LONGEST = 80  # of a name of a subject in that of a file; a file system takes 255 bytes for two of them


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


def check_vacant(out: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Raise an OutputError where a run cannot be written to ``out``: it is asked before the work, not after."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out must be a folder, but {out} is a file.")
    if holds_partial(out) and not resume and not overwrite:
        raise OutputError(f"{out} holds a run that is not finished. Add --resume to go on, or --overwrite.")
    if resume and not holds_partial(out) and (out / "run.yaml").exists():
        raise OutputError(f"{out} holds a finished run of other options. Name another folder, or add --overwrite.")
    if out.is_dir() and any(out.iterdir()) and not overwrite and not holds_partial(out):
        what = "holds a finished run" if (out / "run.yaml").exists() else "is not empty"
        raise OutputError(f"--out must be new or empty, but {out} {what}. Name another, or add --overwrite.")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".cka-probe-", dir=above).cleanup()
    except OSError as error:
        raise OutputError(f"--out must be in a folder that can be written to, but {above} cannot: {error}") from error


def is_finished(out: Path, options: Mapping[str, Any]) -> bool:
    """Whether ``out`` holds the finished run of these options, so that there is nothing to resume.

    Args:
        out: the folder.
        options: as `write_record` gets them; those that do not change a result are not compared.
    """
    import yaml

    if holds_partial(out) or not (out / "run.yaml").is_file():
        return False
    try:
        before = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["options"]
    except (yaml.YAMLError, OSError, UnicodeDecodeError, KeyError, TypeError):
        return False
    now = _plain(options)
    return all(before.get(name) == value for name, value in now.items() if name not in _WITHOUT_EFFECT)


def write_comparison(out: Path, run: Run) -> None:
    """Write the results, the table, the pictures and the report of a comparison, and its record as run.yaml.

    Args:
        out: the folder. Files of an earlier run in it are replaced.
        run: the first measure takes the plain names; another stands before the suffix: ``similarity.cka-rbf.npz``.

    Raises:
        OutputError: the folder cannot be written.
    """
    import pandas as pd

    from cka_probe.report import draw

    with all_together(
        out,
        replaced=(*(f"{name}.*" for name in PICTURES), "similarity.*", "influence.csv", "samples.png", "report.html"),
    ) as folder:
        for index, (measure, similarity) in enumerate(run.results.items()):
            similarity.save(folder / (f"similarity.{measure}.npz" if index else "similarity.npz"))
        table = pd.concat([similarity.to_frame() for similarity in run.results.values()])
        table.to_csv(folder / "similarity.csv", index=False)
        _save_curves(folder, run.results.values())
        _save_influence(folder, run.results.values())
        if run.samples:
            _save_samples(folder / "samples.png", run.samples)
        # The samples as they can be read again, so that the report can be drawn again the same.
        draw(folder, replace(run, samples=_load_samples(folder, list(run.samples))))
        write_record(folder, {**run.record, "result": _found(run.results)})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.yaml``, which tells how a run was made and that it is finished."""
    import yaml

    with (folder / "run.yaml").open("w", encoding="utf-8") as file:
        yaml.safe_dump(_plain(record), file, sort_keys=False, allow_unicode=True, width=120)


def read_comparison(folder: Path) -> Run:
    """Read what `write_comparison` wrote.

    Raises:
        OutputError: the folder holds no finished comparison, or a file of it cannot be read.
    """
    import yaml

    if not (folder / "run.yaml").is_file() or not (folder / "similarity.npz").is_file():
        raise OutputError(f"A finished comparison must hold run.yaml and similarity.npz, but {folder} does not.")
    try:
        record = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{folder / 'run.yaml'} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise OutputError(f"{folder / 'run.yaml'} must hold the record of a run, but holds {type(record).__name__}.")
    first = Similarity.load(folder / "similarity.npz")
    others = [Similarity.load(path) for path in sorted(folder.glob("similarity.?*.npz"))]
    order = list((record.get("result") or {}).get("measures", ()))  # as they were asked for
    others.sort(key=lambda one: order.index(one.measure) if one.measure in order else len(order))
    results = {similarity.measure: similarity for similarity in (first, *others)}
    names = [s["name"] for s in first.provenance.get("subjects", []) if "stored" not in s]  # those that saw images
    return Run(results, {key: value for key, value in record.items() if key != "result"}, _load_samples(folder, names))


def redraw(folder: Path) -> None:
    """Draw the pictures and the report of a finished comparison again.

    Raises:
        OutputError: the folder holds no finished comparison, or cannot be written.
    """
    from cka_probe.report import draw

    run = read_comparison(folder)
    with all_together(folder, replaced=(*(f"{name}.*" for name in PICTURES), "report.html")) as aside:
        draw(aside, run)
        _save_curves(aside, run.results.values())


def write_difference(out: Path, before: Path, after: Path) -> None:
    """Draw what changed between two finished comparisons of the same layers, and write it as a table.

    Raises:
        OutputError: a folder holds no finished comparison, or ``out`` cannot be written.
        SpecError: their layers differ, or they have no measure in common.
    """
    from cka_probe.difference import draw_difference

    first, second = read_comparison(before), read_comparison(after)
    with all_together(out, replaced=("difference.*",)) as folder:
        draw_difference(folder, first, second, names=(str(before), str(after)))


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """Label -> a name for its files, without a suffix: what a file system may not like is left out, no two are equal.

    >>> file_names(["zoo:vit [noise:0.2]", "a/b", "a:b"])
    {'zoo:vit [noise:0.2]': 'zoo_vit_noise_0.2', 'a/b': 'a_b', 'a:b': 'a_b-1'}
    """
    names: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^\w.@=-]+", "_", label).strip("_.")[-_LONGEST:].lstrip("_.") or "subject"
        free = (f"{plain}{f'-{number}' if number else ''}" for number in count())
        taken = {name.lower() for name in names.values()}
        names[label] = next(name for name in free if name.lower() not in taken)
    return names


@contextmanager
def all_together(out: Path, *, replaced: Sequence[str], moved: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, whose files move to ``out`` when the block ends well, and vanish when it does not.

    Files of ``out`` that match ``replaced`` are removed before, and those of ``moved``, from elsewhere, go there too.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Inside a folder that exists: it may be a mount, and files are renamed within a file system only.
        home = out if out.is_dir() else out.parent
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=home))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    try:
        yield aside
        out.mkdir(exist_ok=True)
        if (aside / "run.yaml").exists():
            # It goes first and comes last: a folder that holds it holds a finished run, and that one alone.
            (out / "run.yaml").unlink(missing_ok=True)
        for pattern in replaced:
            for stale in out.glob(pattern):
                stale.unlink(missing_ok=True)
        for path in sorted([*moved, *aside.iterdir()], key=lambda path: path.name == "run.yaml"):
            os.replace(path, out / path.name)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _save_curves(folder: Path, results: Iterable[Similarity]) -> None:
    """``curve.csv``, where there are curves: a row a cell and number of examples."""
    import pandas as pd

    curves = [similarity.curve_frame() for similarity in results if similarity.curve is not None]
    if curves:
        pd.concat(curves).to_csv(folder / "curve.csv", index=False)


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
        pd.DataFrame(rows, columns=columns).to_csv(folder / "influence.csv", index=False)


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
    from PIL import Image, UnidentifiedImageError

    path = folder / "samples.png"
    if not path.is_file():
        return {}
    try:
        with Image.open(path) as file:
            sheet = np.asarray(file.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from error
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


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
