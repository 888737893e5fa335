"""The folder of a finished run: its files appear all together, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cka_probe.errors import OutputError
from cka_probe.similarity import Similarity


def check_vacant(out: Path, *, overwrite: bool) -> None:
    """Raise an OutputError where a run cannot be written to ``out``: it is asked before the work, not after."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out must be a folder, but {out} is a file.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        what = "holds a finished run" if (out / "run.yaml").exists() else "is not empty"
        raise OutputError(f"--out must be new or empty, but {out} {what}. Name another, or add --overwrite.")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".cka-probe-", dir=above).cleanup()
    except OSError as error:
        raise OutputError(f"--out must be in a folder that can be written to, but {above} cannot: {error}") from error


def write_comparison(out: Path, results: Mapping[str, Similarity], record: Mapping[str, Any]) -> list[Path]:
    """Write the result, the table and the pictures of a comparison, and its record as run.yaml.

    Args:
        out: the folder. Files of an earlier run in it are replaced.
        results: measure -> similarity. The first takes the plain names; another measure stands before the suffix,
            as in ``similarity.cka-rbf.npz``.
        record: options and command, for run.yaml.

    Returns:
        The paths of the files, the heatmap of the first measure before all others.
    """
    import pandas as pd
    import yaml

    from cka_probe.plots import plot_pairs

    first = next(iter(results.values()))
    with _all_together(out) as folder:
        names = []
        for index, (measure, similarity) in enumerate(results.items()):
            infix = f".{measure}" if index else ""
            figure = plot_pairs(similarity)
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"heatmap{infix}.{suffix}")
                names.append(f"heatmap{infix}.{suffix}")
            similarity.save(folder / f"similarity{infix}.npz")
            names.append(f"similarity{infix}.npz")
        table = pd.concat([similarity.to_frame() for similarity in results.values()])
        table.to_csv(folder / "similarity.csv", index=False)
        with (folder / "run.yaml").open("w", encoding="utf-8") as file:
            yaml.safe_dump(
                {**record, "result": _plain(first.provenance)}, file, sort_keys=False, allow_unicode=True, width=120
            )
    return [out / name for name in (*names, "similarity.csv", "run.yaml")]


@contextmanager
def _all_together(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to ``out`` when the block ends well, and vanish when it does not."""
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
        # run.yaml goes first and comes last: a folder that holds it holds a finished run, and that one alone.
        for stale in (out / "run.yaml", *out.glob("heatmap.*"), *out.glob("similarity.*")):
            stale.unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "run.yaml"):
            os.replace(path, out / path.name)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
