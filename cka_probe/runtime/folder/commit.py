"""Files that appear together: staged in a private folder, recorded, and then moved, so that a kill loses none of them.

A process that dies before the record is written leaves the folder as it was; one that dies after it leaves a record
that the next opening of the folder completes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cka_probe.errors import OutputError
from cka_probe.runtime.files import require_regular
from cka_probe.runtime.folder.manifest import Content, sync_folder, write_synced
from cka_probe.runtime.folder.owned_files import CHECKPOINT, PRIVATE, RECORD, OwnedFiles

_COMMIT = "commit"
_LISTS = ("names", "remove")


def new_stage(files: OwnedFiles) -> Path:
    """A private folder to write into."""
    stage = files.private / f"results-{secrets.token_hex(4)}"
    files.manifest.staging = stage.name
    files.save()
    stage.mkdir()
    return stage


class Change(NamedTuple):
    """What a commit makes of a folder.

    Attributes:
        part: that the new files belong to; those for the private folder are checkpoints.
        replaces: parts whose other files are removed.
        kind: of the run that starts with this, or is complete with it: what belonged to checkpoints is removed too.
            None where neither is so.
        finished: whether that run is complete.
    """

    part: str
    replaces: Collection[str]
    kind: str | None
    finished: bool


def commit(files: OwnedFiles, stage: Path, change: Change) -> None:
    """Move what is staged into the folder.

    Args:
        files: of the folder.
        stage: from `new_stage`.
        change: what becomes of the folder.

    Raises:
        OutputError: a file of other origin is in the way; what is staged stays, and the message names its folder.
        OSError: the folder cannot be written.
    """
    names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if not path.is_dir())
    contents = {name: Content.of(stage / name) for name in sorted(names, key=lambda name: name == RECORD)}
    manifest, (part, replaces, kind, finished) = files.manifest, change
    taken = [name for name, new in contents.items() if files.is_taken(name, new)]
    if taken:
        manifest.staging = None  # it is the user's now
        files.save()
        raise OutputError(f"{files.clash(taken)} The results are in {stage}.")
    old = [name for name, entry in manifest.entries.items() if entry.part in replaces and name not in contents]
    for name, content in contents.items():
        manifest.add(name, content, part=CHECKPOINT if name.startswith(f"{PRIVATE}/") else part)
    files.save()
    record = {"stage": stage.name, "names": list(contents), "remove": old, "kind": kind, "finished": finished}
    write_synced(files.private / _COMMIT, record)
    _move(files, record)


def is_committed(files: OwnedFiles) -> bool:
    """Whether a move is recorded that is not complete."""
    return os.path.lexists(files.private / _COMMIT)


def complete(files: OwnedFiles) -> bool:
    """Complete a move that a process died in, and remove what was being staged.

    Returns:
        Whether there was one.

    Raises:
        OutputError: its record is damaged, or a file of other origin is in the way.
        OSError: the folder cannot be written.
    """
    if files.known is None:
        return False
    path, found = files.private / _COMMIT, is_committed(files)
    if found:
        try:
            require_regular(path)
            record = json.loads(path.read_text(encoding="utf-8"))
            fits = record["stage"] == files.known.staging is not None
            if not (fits and set(record["names"]) <= set(files.known.entries) and _is_record(record)):
                raise ValueError("it does not fit the manifest")
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise OutputError(f"{path} is damaged: {error}. Name another folder.") from error
        _move(files, record)
    drop_stage(files)
    return found


def _is_record(record: dict[str, Any]) -> bool:
    names = all(isinstance(record[key], list) and all(isinstance(n, str) for n in record[key]) for key in _LISTS)
    return names and isinstance(record["kind"], (str, type(None))) and isinstance(record["finished"], bool)


def drop_stage(files: OwnedFiles) -> None:
    """Remove what is staged."""
    if files.known is not None and files.known.staging is not None:
        shutil.rmtree(files.private / files.known.staging, ignore_errors=True)
        files.known.staging = None
        with suppress(OSError):
            files.save()


def _move(files: OwnedFiles, record: dict[str, Any]) -> None:
    """Move what is staged into place. It can be done again from any point."""
    manifest, stage, folder = files.manifest, files.private / record["stage"], files.path
    if (stage / RECORD).exists():
        files.remove([RECORD], forget=False)  # it goes first and comes last
    files.remove(record["remove"])
    for name in record["names"]:
        if not (stage / name).exists():
            continue  # moved before the process died
        if files.is_taken(name, Content.of(stage / name)):
            raise OutputError(f"{files.clash([name])} The results are in {stage}.")
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(stage / name, folder / name)
    for changed in {(folder / name).parent for name in record["names"]}:
        sync_folder(changed)
    for name in record["names"]:
        manifest.settle(name, manifest.entries[name].contents[-1])
    if record["kind"] is not None:
        manifest.kind, manifest.finished = record["kind"], record["finished"]
        files.clear_scratch()
    files.save()
    (files.private / _COMMIT).unlink()
    drop_stage(files)
