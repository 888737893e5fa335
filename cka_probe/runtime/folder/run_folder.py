"""The folder of a run: who may write into it, and the only code that removes or replaces a file there.

A manifest (``.cka-probe/manifest``) lists what the tool wrote. A file that it does not list, or that was changed since,
is never removed or replaced, whatever options are given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cka_probe.errors import OutputError
from cka_probe.runtime.folder import claims
from cka_probe.runtime.folder.claims import State
from cka_probe.runtime.folder.commit import Change, commit, complete, drop_stage, is_committed, new_stage
from cka_probe.runtime.folder.location import kind_of, linked, usable_folder
from cka_probe.runtime.folder.lock import Lock
from cka_probe.runtime.folder.manifest import NOTHING, Content
from cka_probe.runtime.folder.owned_files import (
    CHECKPOINT,
    CHECKPOINTS,
    PRIVATE,
    RECORD,
    REPORT,
    RESULTS,
    OwnedFiles,
    listed,
)
from cka_probe.runtime.interrupts import uninterrupted

__all__ = ["CHECKPOINT", "PRIVATE", "RECORD", "REPORT", "RESULTS", "RunFolder", "kind_of", "linked", "usable_folder"]

logger = logging.getLogger(__name__)

_BEFORE_MANIFEST = {"lock", "lock.held", "manifest.new"}
"""What a run that was killed at once may leave in the private folder."""


class RunFolder:
    """The folder of a run, locked while this object is entered.

    Args:
        out: the folder; it is made where it does not exist.
        option: that names it, for messages.

    Attributes:
        path: of the folder, absolute.
    """

    def __init__(self, out: str | Path, *, option: str = "--out") -> None:
        self.path = usable_folder(out, option)
        self._option = option
        self._files = OwnedFiles(self.path, option)
        self._private = self._files.private
        self._lock = Lock(self._private / "lock", self.path)
        self._claimed = False
        self._made: list[Path] = []  # folders that were not there before, the outermost first

    def __enter__(self) -> RunFolder:
        """Make and lock the folder, and complete what a run was killed while moving.

        Raises:
            OutputError: another run holds it, it cannot be written, or its manifest is damaged.
        """
        try:
            above = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self._made = [*reversed(above)]
            self.path.mkdir(parents=True, exist_ok=True)
            if self._private.is_symlink() or (self._private.exists() and not self._private.is_dir()):
                raise OutputError(
                    f"{self._private} must be a folder, but is none. Move it away, or name another folder."
                )
            if not self._private.exists():
                self._private.mkdir(exist_ok=True)
                self._made.append(self._private)
            others = sorted({path.name for path in self._private.iterdir()} - _BEFORE_MANIFEST)
            if others and not os.path.lexists(self._private / "manifest"):
                raise OutputError(
                    f"{self._private} holds {listed(others)}, which cka-probe did not write. Move it away, or name "
                    "another folder."
                )
            self._lock.acquire()
        except OSError as error:
            raise OutputError(
                f"{self._option} must be a folder that can be written, but {self.path} cannot be: {error}"
            ) from error
        try:
            self._files.load()
            with self._writing():
                if complete(self._files):
                    logger.info("Completed the interrupted write of an earlier run in %s.", self.path)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder. Of a run that ended before its first checkpoint, nothing is left in it.

        A run that wrote nothing, such as one that was refused, leaves no folder that was not there before.
        """
        try:
            known = self._files.known
            if known is not None and not self.has_checkpoint and not is_committed(self._files):
                with suppress(OSError):
                    if self._claimed and not known.finished:
                        self._files.remove(list(known.entries))
                    self._files.clear_scratch()
                    self._files.save()
            if known is None and self._private in self._made:
                self._lock.remove()
                with suppress(OSError):  # somebody else wrote into it meanwhile
                    for path in reversed(self._made):
                        path.rmdir()
        finally:
            self._lock.release()

    @property
    def state(self) -> State:
        """See `cka_probe.runtime.folder.claims.state_of`."""
        return claims.state_of(self._files)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run can be resumed here."""
        return claims.has_checkpoint(self._files)

    @property
    def is_moving(self) -> bool:
        """Whether a run was killed while its files were moved: to enter the folder completes that."""
        return is_committed(self._files)

    @property
    def checkpoints(self) -> Path:
        """The private folder in which `cka_probe.runtime.folder.checkpoint.load_checkpoint` finds checkpoints."""
        return self._private

    def names(self, part: str) -> list[str]:
        """The files of a part, as the tool wrote them last."""
        return self._files.names(part)

    def holds(self, name: str) -> bool:
        """Whether a file that the tool wrote is there."""
        return self._files.known is not None and name in self._files.known.entries and (self.path / name).is_file()

    def check_origin(self, *, overwrite: bool, writes: Iterable[str]) -> None:
        """Check, before the folder is entered, that it is not one of others; nothing is made in it.

        Args:
            overwrite: as for `claim`.
            writes: as for `claim`.

        Raises:
            OutputError: it may not be written into.
        """
        if not self._private.exists():
            self.claim("", resume=False, overwrite=overwrite, writes=writes)

    def claim(
        self, kind: str, *, resume: bool, overwrite: bool, writes: Iterable[str], only: Collection[str] | None = None
    ) -> None:
        """Check that a run may start here, or go on: before the work, not after it. Nothing is changed.

        Args:
            kind: of the run.
            resume: go on with a run that is not finished.
            overwrite: replace what an earlier run wrote.
            writes: paths, relative to the folder, that the run will write.
            only: kinds of runs that may be overwritten; all of them where None.

        Raises:
            OutputError: it may not; the message says why and what to do.
        """
        claims.Claim(kind, resume, overwrite, only).check(self._files, writes)
        self._claimed = True

    def check_checkpoints(self, kind: str) -> None:
        """Check that checkpoints of a run may be kept here, beside files of others.

        Raises:
            OutputError: another run is here.
        """
        claims.check_checkpoints(self._files, kind)
        self._claimed = True

    def check_free(self, writes: Iterable[str]) -> None:
        """Check that files can be written without harm to one that the tool did not write.

        Args:
            writes: their paths, relative to the folder.

        Raises:
            OutputError: one of them is of other origin, or was changed.
        """
        claims.check_free(self._files, writes)

    def check_folder(self, name: str) -> None:
        """Check that a folder in this one can be written into.

        Raises:
            OutputError: there is something else of that name.
        """
        claims.check_folder(self._files, name)

    def check_inputs(self, paths: Iterable[Path]) -> None:
        """Check that a run does not read what it replaces.

        Args:
            paths: of files and folders that it reads.

        Raises:
            OutputError: one of them is this folder, or lies in it.
        """
        claims.check_inputs(self._files, paths, self._option)

    @contextmanager
    def starting(self, kind: str) -> Iterator[Path]:
        """A folder for the first files of a run, a checkpoint in its private folder among them.

        They appear together when the block ends well, and what an earlier run left goes with that: killed at any
        moment, the folder holds the one run or the other.

        Args:
            kind: of the run.

        Raises:
            OutputError: they cannot be written.
        """
        with self._staged() as stage:
            (stage / PRIVATE).mkdir()
            yield stage
            parts = {entry.part for entry in self._files.manifest.entries.values()}
            with uninterrupted():
                commit(self._files, stage, Change(RESULTS, parts, kind, finished=False))

    def put(self, name: str, write: Callable[[Path], Any], *, part: str = RESULTS) -> None:
        """Write one file, whole or not at all, in place of what the run wrote there before.

        Args:
            name: of the file.
            write: called with the path to write to.
            part: that it belongs to.

        Raises:
            OutputError: it cannot be written, or a file of other origin has that name.
        """
        with self.together(part) as folder:
            write(folder / name)

    @contextmanager
    def together(self, part: str, *, replaces: Collection[str] = (), kind: str | None = None) -> Iterator[Path]:
        """A folder to write into, whose files appear in the run's folder together when the block ends well.

        Args:
            part: that they belong to.
            replaces: parts whose earlier files are removed.
            kind: of the run, where its results are complete with this: its checkpoints go.

        Raises:
            OutputError: they cannot be written. Where a file of other origin has one of their names, they stay in a
                folder of their own, which the message names.
        """
        with self._staged() as stage:
            yield stage
            parts = replaces if kind is None else (*replaces, CHECKPOINT)
            with uninterrupted():
                commit(self._files, stage, Change(part, parts, kind, finished=True))

    def growing(self, name: str, *, part: str = RESULTS) -> Path:
        """The path of a file that the caller makes and only appends to; see `grown`.

        Raises:
            OutputError: there is a file of that name.
        """
        with self._writing():
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            if os.path.lexists(path) or path.parent.is_symlink():
                raise OutputError(self._files.clash([name]))
            self._files.manifest.add(name, Content(0, NOTHING), part=part, grows=True)
            self._files.save()
            return path

    def grown(self, name: str) -> None:
        """Note what a growing file holds now."""
        with self._writing():
            self._files.manifest.settle(name, Content.of(self.path / name))
            self._files.save()

    def scratch(self) -> Path:
        """A private folder for data that grow while a run is not finished; `clear_checkpoints` removes it.

        Raises:
            OutputError: it cannot be made, or a folder of other origin has its name.
        """
        with self._writing():
            path = self._files.scratch()
        if path is None:
            raise OutputError(self._files.clash([f"{PRIVATE}/features"]))
        return path

    def keep_checkpoint(self, kind: str, write: Callable[[Path], Any], *, keep_previous: bool = False) -> None:
        """Write a checkpoint; the one that was there becomes the previous one. At any moment a whole one remains.

        Args:
            kind: of the run.
            write: called with the path to write to.
            keep_previous: the previous one stays what it is, as the run went on from that.

        Raises:
            OutputError: it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        self._files.manifest.kind = kind
        last, previous = CHECKPOINTS
        current = f"{PRIVATE}/{last}"
        with uninterrupted(), self.together(CHECKPOINT) as stage:
            folder = stage / PRIVATE
            folder.mkdir()
            write(folder / last)
            entry = self._files.manifest.entries.get(current)
            # A damaged one does not displace a good one.
            if entry is not None and not keep_previous and entry.matches(self.path / current):
                linked(self.path / current, folder / previous)

    def remove(self, part: str) -> None:
        """Remove the files of a part.

        Raises:
            OutputError: one cannot be removed.
        """
        with self._writing():
            self._files.remove(self.names(part))
            self._files.save()

    def clear_checkpoints(self) -> None:
        """Remove the checkpoints, and the data that belong to them: the run is finished, or starts again."""
        if self._files.known is None:
            return
        with self._writing():
            self._files.remove(self.names(CHECKPOINT))
            self._files.clear_scratch()
            self._files.save()

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A private folder; the block writes into it and commits it. What is not committed goes."""
        with self._writing():
            stage = new_stage(self._files)
            try:
                yield stage
            except BaseException:
                if not is_committed(self._files):  # else the next opening completes the move
                    drop_stage(self._files)
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}") from error
