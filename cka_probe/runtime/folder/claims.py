"""Whether a run may write into a folder: checked before its work. Nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cka_probe.errors import OutputError
from cka_probe.runtime.folder.owned_files import CHECKPOINT, OwnedFiles

State = Literal["vacant", "unfinished", "finished", "foreign"]


def has_checkpoint(files: OwnedFiles) -> bool:
    """Whether a run can be resumed."""
    return any((files.path / name).exists() for name in files.names(CHECKPOINT))


def state_of(files: OwnedFiles) -> State:
    """``"unfinished"`` if a run can be resumed; ``"foreign"`` if the tool wrote none of what is there."""
    if has_checkpoint(files):
        return "unfinished"
    if files.known is not None and files.known.finished:
        return "finished"
    return "foreign" if files.foreign() else "vacant"


@dataclass(frozen=True)
class Claim:
    """A run that wants to start in a folder, or to go on there.

    Attributes:
        kind: of the run.
        resume: go on with a run that is not finished.
        overwrite: replace what an earlier run wrote.
        only: kinds of runs that may be overwritten; None for all of them.
    """

    kind: str
    resume: bool
    overwrite: bool
    only: Collection[str] | None = None

    def check(self, files: OwnedFiles, writes: Iterable[str]) -> None:
        """Raise an OutputError if it may not, or one of the paths it writes is taken; it says why and what to do."""
        path, state = files.path, state_of(files)
        before = files.known.kind if files.known is not None else ""
        if state == "unfinished" and not (self.resume or self.overwrite):
            raise OutputError(
                f"{path} holds a run that is not finished. Add --resume to go on, or --overwrite to start over."
            )
        if state == "unfinished" and self.resume and before != self.kind:
            raise OutputError(f"{path} holds an unfinished run of {before}, not of {self.kind}. Name another folder.")
        if state == "finished" and not self.overwrite:
            raise OutputError(f"{path} holds a finished run. Name another folder, or add --overwrite.")
        if files.is_old() or (state == "foreign" and not self.overwrite):
            raise OutputError(files.not_empty())
        if self.only is not None and before and before not in self.only:
            raise OutputError(f"{path} holds a run of {before}, which {self.kind} never replaces. Name another folder.")
        check_free(files, writes, every_known=self.overwrite and not (self.resume and state == "unfinished"))


def check_checkpoints(files: OwnedFiles, kind: str) -> None:
    """Raise an OutputError if another run is here, whose checkpoints these would replace."""
    known = files.known
    if known is not None and (known.finished or known.kind not in ("", kind)):
        raise OutputError(
            f"{files.path} holds a run of {known.kind}, so that it cannot take the checkpoints of another one. Name "
            "another folder."
        )
    check_free(files, [])


def check_free(files: OwnedFiles, writes: Iterable[str], *, every_known: bool = False) -> None:
    """Raise an OutputError if a file to be written would replace one that the tool did not write, or that was changed.

    Args:
        files: of the folder.
        writes: paths, relative to the folder.
        every_known: all files of the earlier run must be as it wrote them, too.
    """
    names = dict.fromkeys(writes)
    if every_known and files.known is not None:
        entries = files.known.entries.items()
        names.update(dict.fromkeys(name for name, entry in entries if entry.part != CHECKPOINT))
    taken = [name for name in names if files.is_taken(name)] + files.private_clashes()
    if taken:
        raise OutputError(files.clash(taken))


def check_folder(files: OwnedFiles, name: str) -> None:
    """Raise an OutputError if something else than a folder has this name."""
    path = files.path / name
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        raise OutputError(files.clash([name]))


def check_inputs(files: OwnedFiles, paths: Iterable[Path], option: str) -> None:
    """Raise an OutputError if one of the paths that a run reads is its own folder, or lies in it."""
    for path in paths:
        with suppress(OSError, ValueError, RuntimeError):
            real = path.expanduser().resolve()
            if files.known is not None and files.path in (real, *real.parents):
                raise OutputError(
                    f"{option} holds {path}, which this run reads and would replace. Name another folder."
                )
