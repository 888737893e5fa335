"""The folder of a run: who may write into it, and the only code that removes or replaces a file there.

A manifest (``.cka-probe/manifest``) lists what the tool wrote. A file that it does not list, or that was changed since,
is never removed or replaced, whatever options are given.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from cka_probe.errors import OutputError
from cka_probe.interrupts import uninterrupted
from cka_probe.runtime.lock import Lock
from cka_probe.runtime.manifest import Content, Manifest, sync_folder, write_synced

logger = logging.getLogger(__name__)

PRIVATE = ".cka-probe"
"""In the folder of a run: the manifest, the lock, checkpoints, and results that are being put together."""

RECORD = "run.yaml"
"""The record of a run. It appears last: a folder that holds it holds all results."""

RESULTS, REPORT, CHECKPOINT = "results", "report", "checkpoint"
"""The parts of a run's folder."""

State = Literal["vacant", "unfinished", "finished", "foreign"]

_BEFORE_MANIFEST = {"lock", "lock.held", "manifest.new"}
"""What a run that was killed at once may leave in the private folder."""

_LONGEST_NAME = 255  # bytes, on all common file systems


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
        self._private = self.path / PRIVATE
        self._lock = Lock(self._private / "lock", self.path)
        self._known: Manifest | None = None

    def __enter__(self) -> RunFolder:
        """Make and lock the folder, and complete what a run was killed while moving.

        Raises:
            OutputError: another run holds it, it cannot be written, or its manifest is damaged.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._private.is_symlink() or (self._private.exists() and not self._private.is_dir()):
                raise OutputError(
                    f"{self._private} must be a folder, but is none. Move it away, or name another folder."
                )
            self._private.mkdir(exist_ok=True)
            others = sorted({path.name for path in self._private.iterdir()} - _BEFORE_MANIFEST)
            if others and not os.path.lexists(self._private / "manifest"):
                raise OutputError(
                    f"{self._private} holds {_listed(others)}, which cka-probe did not write. Move it away, or name "
                    "another folder."
                )
            self._lock.acquire()
        except OSError as error:
            raise OutputError(
                f"{self._option} must be a folder that can be written, but {self.path} cannot be: {error}"
            ) from error
        try:
            self._known = Manifest.load(self._private / "manifest")
            with self._writing():
                self._complete()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder. Of a run that ended before its first checkpoint, nothing is left in it."""
        try:
            if self._known is not None and not self.has_checkpoint and not (self._private / "commit").exists():
                with suppress(OSError):
                    if not self._known.finished:
                        self._remove(list(self._known.entries))
                    self._clear_scratch()
                    self._save()
        finally:
            self._lock.release()

    @property
    def state(self) -> State:
        """``"unfinished"`` where it can be resumed; ``"foreign"`` where it holds something of other origin only."""
        if self.has_checkpoint:
            return "unfinished"
        if self._known is not None and self._known.finished:
            return "finished"
        return "foreign" if self._foreign() else "vacant"

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run can be resumed here."""
        return any((self.path / name).exists() for name in self.names(CHECKPOINT))

    @property
    def checkpoints(self) -> Path:
        """The private folder in which `cka_probe.checkpoint.load_checkpoint` finds checkpoints."""
        return self._private

    def names(self, part: str) -> list[str]:
        """The files of a part, as the tool wrote them last."""
        known = self._known.entries if self._known is not None else {}
        return [name for name, entry in known.items() if entry.part == part]

    def holds(self, name: str) -> bool:
        """Whether a file that the tool wrote is there."""
        return self._known is not None and name in self._known.entries and (self.path / name).is_file()

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

    def claim(self, kind: str, *, resume: bool, overwrite: bool, writes: Iterable[str]) -> None:
        """Check that a run may start here, or go on: before the work, not after it. Nothing is changed.

        Args:
            kind: of the run.
            resume: go on with a run that is not finished.
            overwrite: replace what an earlier run wrote.
            writes: paths, relative to the folder, that the run will write.

        Raises:
            OutputError: it may not; the message says why and what to do.
        """
        state = self.state
        if state == "unfinished" and not (resume or overwrite):
            raise OutputError(
                f"{self.path} holds a run that is not finished. Add --resume to go on, or --overwrite to start anew."
            )
        if state == "unfinished" and resume and self._manifest.kind != kind:
            raise OutputError(
                f"{self.path} holds an unfinished run of {self._manifest.kind}, not of {kind}. Name another folder."
            )
        if state == "finished" and not overwrite:
            raise OutputError(f"{self.path} holds a finished run. Name another folder, or add --overwrite.")
        if state == "foreign" and not overwrite:
            raise OutputError(self._not_empty())
        self.check_free(writes, every_known=overwrite and not (resume and state == "unfinished"))

    def check_free(self, writes: Iterable[str], *, every_known: bool = False) -> None:
        """Check that files can be written without harm to one that the tool did not write.

        Args:
            writes: their paths, relative to the folder.
            every_known: all files of the earlier run must be as it wrote them, too.

        Raises:
            OutputError: one of them is of other origin, or was changed.
        """
        names = dict.fromkeys(writes)
        if every_known and self._known is not None:
            names.update(dict.fromkeys(name for name, entry in self._known.entries.items() if entry.part != CHECKPOINT))
        taken = [name for name in names if self._is_taken(name)]
        if taken:
            raise OutputError(self._clash(taken))

    def start(self, kind: str) -> None:
        """A run starts here: what an earlier one left is removed.

        Raises:
            OutputError: a file cannot be removed.
        """
        with self._writing():
            self._remove(list(self._manifest.entries))
            self._clear_scratch()
            self._known = Manifest(kind=kind)
            self._save()

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
            kind: of the run, where its results are complete with this.

        Raises:
            OutputError: they cannot be written. Where a file of other origin has one of their names, they stay in a
                folder of their own, which the message names.
        """
        with self._writing():
            stage = self._private / f"results-{secrets.token_hex(4)}"
            self._manifest.staging = stage.name
            self._save()
            stage.mkdir()
        try:
            with self._writing():
                yield stage
                with uninterrupted():
                    self._move(self._list(stage, part, replaces, kind))
        except BaseException:
            if not (self._private / "commit").exists():  # else the next opening completes the move
                self._drop_stage()
            raise

    def growing(self, name: str, *, part: str = RESULTS) -> Path:
        """The path of a file that the caller makes and only appends to; see `grown`.

        Raises:
            OutputError: there is a file of that name.
        """
        with self._writing():
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            if os.path.lexists(path) or path.parent.is_symlink():
                raise OutputError(self._clash([name]))
            self._manifest.add(name, Content(0, _NOTHING), part=part, grows=True)
            self._save()
            return path

    def grown(self, name: str) -> None:
        """Note what a growing file holds now."""
        with self._writing():
            self._manifest.settle(name, Content.of(self.path / name))
            self._save()

    def scratch(self) -> Path:
        """A private folder for data that grow while a run is not finished; `clear_checkpoints` removes it.

        Raises:
            OutputError: it cannot be made, or a folder of other origin has its name.
        """
        with self._writing():
            path = self._private / "features"
            if not self._manifest.scratch:
                if os.path.lexists(path):
                    raise OutputError(self._clash([f"{PRIVATE}/features"]))
                self._manifest.scratch = True
                self._save()
            path.mkdir(exist_ok=True)
            return path

    def keep_checkpoint(self, kind: str, write: Callable[[Path], Any], *, last: str, previous: str) -> None:
        """Write a checkpoint; the one that was there becomes the previous one. At any moment a whole one remains.

        Args:
            kind: of the run.
            write: called with the path to write to.
            last: name of the checkpoint.
            previous: name of the one before it.

        Raises:
            OutputError: it cannot be written, as on a full disk; the checkpoints before it are as they were.
        """
        self._manifest.kind = kind
        current = f"{PRIVATE}/{last}"
        with uninterrupted(), self.together(CHECKPOINT) as stage:
            folder = stage / PRIVATE
            folder.mkdir()
            write(folder / last)
            entry = self._manifest.entries.get(current)
            if entry is not None and entry.matches(self.path / current):  # a damaged one does not displace a good one
                _linked(self.path / current, folder / previous)

    def remove(self, part: str) -> None:
        """Remove the files of a part.

        Raises:
            OutputError: one cannot be removed.
        """
        with self._writing():
            self._remove(self.names(part))
            self._save()

    def clear_checkpoints(self) -> None:
        """Remove the checkpoints, and the data that belong to them: the run is finished, or starts anew."""
        if self._known is None:
            return
        with self._writing():
            self._remove(self.names(CHECKPOINT))
            self._clear_scratch()
            self._save()

    @property
    def _manifest(self) -> Manifest:
        if self._known is None:
            self._known = Manifest()
        return self._known

    def _save(self) -> None:
        self._manifest.save(self._private / "manifest")

    def _is_own(self, name: str) -> bool:
        """Whether a listed file is there as the tool wrote it, with no symbolic link on the way to it.

        In the private folder nobody else writes: a checkpoint may be damaged, and is replaced.
        """
        entry = self._known.entries.get(name) if self._known is not None else None
        path = self.path / name
        if entry is None or self._leads_out(name):
            return False
        return (path.is_file() and not path.is_symlink()) if name.startswith(f"{PRIVATE}/") else entry.matches(path)

    def _leads_out(self, name: str) -> bool:
        return any((self.path / above).is_symlink() for above in list(Path(name).parents)[:-1])

    def _is_taken(self, name: str) -> bool:
        """Whether something that is not the tool's has that name."""
        return self._leads_out(name) or (os.path.lexists(self.path / name) and not self._is_own(name))

    def _foreign(self) -> list[str]:
        """Names in the folder that the manifest does not list."""
        known = {Path(name).parts[0] for name in self._known.entries} if self._known is not None else set()
        there = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(path.name for path in there if path.name != PRIVATE and path.name not in known)

    def _not_empty(self) -> str:
        if self._known is None and (self.path / RECORD).exists():
            return (
                f"{self.path} holds a run of cka-probe 0.1, which kept no list of its files: it can be read and "
                f"reported on, but not resumed or overwritten. Name another folder ({self._option})."
            )
        held = _listed(self._foreign())
        return f"{self._option} must be new or empty, but {self.path} holds {held}. Name another folder."

    def _clash(self, names: list[str]) -> str:
        if self._known is None and (self.path / RECORD).exists():
            return self._not_empty()
        changed = [name for name in names if self._known is not None and name in self._known.entries]
        what = "were changed since cka-probe wrote them" if changed else "were not written by cka-probe"
        if len(changed or names) == 1:
            what = what.replace("were", "was", 1).replace("them", "it")
        return (
            f"{_listed(changed or names)} in {self.path} {what}, and would be replaced. Move such files away, or name "
            "another folder."
        )

    def _list(self, stage: Path, part: str, replaces: Collection[str], kind: str | None) -> dict[str, Any]:
        """List what is staged in the manifest, and write the commit record: from here on the move is completed."""
        names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if not path.is_dir())
        contents = {name: Content.of(stage / name) for name in sorted(names, key=lambda name: name == RECORD)}
        manifest = self._manifest
        taken = [name for name, new in contents.items() if self._is_taken(name) and not _holds(self.path / name, new)]
        if taken:
            manifest.staging = None
            self._save()
            raise OutputError(f"{self._clash(taken)} The results are in {stage}.")
        old = [name for name, entry in manifest.entries.items() if entry.part in replaces and name not in contents]
        for name, content in contents.items():
            manifest.add(name, content, part=part)
        self._save()
        record = {"stage": stage.name, "names": list(contents), "remove": old, "kind": kind}
        write_synced(self._private / "commit", record)
        return record

    def _move(self, record: dict[str, Any]) -> None:
        """Move what is staged into place. It can be done again from any point."""
        manifest, stage = self._manifest, self._private / record["stage"]
        if (stage / RECORD).exists():
            self._remove([RECORD], forget=False)  # it goes first and comes last
        self._remove(record["remove"])
        for name in record["names"]:
            if not (stage / name).exists():
                continue  # moved before the process died
            if self._is_taken(name) and not _holds(self.path / name, Content.of(stage / name)):
                raise OutputError(f"{self._clash([name])} The results are in {stage}.")
            (self.path / name).parent.mkdir(exist_ok=True)
            os.replace(stage / name, self.path / name)
        for folder in {(self.path / name).parent for name in record["names"]}:
            sync_folder(folder)
        for name in record["names"]:
            manifest.settle(name, manifest.entries[name].contents[-1])
        if record["kind"] is not None:
            manifest.kind, manifest.finished = record["kind"], True
        self._save()
        (self._private / "commit").unlink()
        self._drop_stage()

    def _complete(self) -> None:
        """Complete a move that a process died in, and remove what it was staging."""
        path = self._private / "commit"
        if self._known is not None and path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                known = record["stage"] == self._known.staging and set(record["names"]) <= set(self._known.entries)
                if not known:
                    raise ValueError("it does not fit the manifest")
            except (ValueError, LookupError, TypeError) as error:
                raise OutputError(f"{path} is damaged: {error}. Name another folder.") from error
            logger.info("Completing what an earlier run wrote into %s.", self.path)
            self._move(record)
        if self._known is not None and self._known.staging is not None:
            self._drop_stage()

    def _drop_stage(self) -> None:
        manifest = self._manifest
        if manifest.staging is not None:
            shutil.rmtree(self._private / manifest.staging, ignore_errors=True)
            manifest.staging = None
            with suppress(OSError):
                self._save()

    def _clear_scratch(self) -> None:
        if self._manifest.scratch:
            shutil.rmtree(self._private / "features", ignore_errors=True)
            self._manifest.scratch = False

    def _remove(self, names: Iterable[str], *, forget: bool = True) -> None:
        """Remove listed files that are unchanged; the others stay, and are the user's from now on."""
        for name in names:
            if self._is_own(name):
                (self.path / name).unlink()
                for above in list(Path(name).parents)[:-1]:
                    if above.parts[0] != PRIVATE:
                        with suppress(OSError):  # it holds something else
                            (self.path / above).rmdir()
            if forget:
                self._manifest.entries.pop(name, None)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}") from error


_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""The SHA-256 of no bytes."""


def usable_folder(out: str | Path, option: str) -> Path:
    """The absolute path of a folder to write into, ``~`` expanded and ``..`` resolved.

    Raises:
        OutputError: there is a file in its place, or a file system takes no such name.
    """
    text = os.fspath(out)
    try:
        text.encode()
        path = Path(text).expanduser().resolve()
        os.lstat(path.anchor)
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise OutputError(f"{option} must have names of at most {_LONGEST_NAME} bytes, but one is longer: {text}")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{option} must be a folder, but {path} is a file.")
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, a NUL, a loop of links, no such user's home
        raise OutputError(f"{option} must name a folder, but {text!r} cannot be one: {error}") from error
    return path


def _holds(path: Path, content: Content) -> bool:
    try:
        return Content.of(path) == content
    except OSError:
        return False


def _linked(path: Path, other: Path) -> None:
    """Give a file a second name; on file systems that have no such thing, a copy."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def kind_of(folder: Path) -> str | None:
    """The kind of run that a folder holds, finished or not, as its manifest says; None without one.

    Raises:
        OutputError: the manifest is damaged.
    """
    known = Manifest.load(folder / PRIVATE / "manifest")
    return known.kind if known is not None else None
