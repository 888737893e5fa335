"""The manifest of a run's folder: which files the tool wrote there, and what they held."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cka_probe.errors import OutputError

FORMAT = 1
_CHUNK_BYTES = 1 << 20

NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""The SHA-256 of no bytes."""


@dataclass(frozen=True)
class Content:
    """What a file held.

    Attributes:
        size: bytes, from the first.
        sha256: of these.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, size: int | None = None) -> Content:
        """The content of a regular file, or of its first ``size`` bytes; it is on the disk afterwards.

        Raises:
            OSError: there is no such regular file (a symbolic link is none), or it cannot be read.
        """
        digest, read = hashlib.sha256(), 0
        with _regular(path) as file:
            os.fsync(file.fileno())
            left = os.fstat(file.fileno()).st_size if size is None else size
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                read += len(chunk)
                left -= len(chunk)
        return cls(read, digest.hexdigest())


@dataclass(frozen=True)
class Entry:
    """A file that the tool wrote.

    Attributes:
        contents: what it may hold: one, or the old and the new one while it is being replaced.
        part: what it belongs to, such as ``"report"``: a part is replaced as a whole.
        grows: whether it is only appended to, so that a longer file with that beginning is the run's own too.
    """

    contents: tuple[Content, ...]
    part: str
    grows: bool = False

    def matches(self, path: Path) -> bool:
        """Whether the file at a path is the one that was written, unchanged."""
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                return False
            return any(
                Content.of(path, known.size) == known
                for known in self.contents
                if (status.st_size >= known.size if self.grows else status.st_size == known.size)
            )
        except OSError:
            return False


@dataclass
class Manifest:
    """What a run's folder holds of the tool's own.

    Attributes:
        kind: of the run: ``"compare"``, ``"extract"``, ``"distill"``, ...
        finished: whether its results are there.
        entries: path relative to the folder -> the file.
        staging: the private folder in which results are being put together; None where there is none.
        scratch: whether the private folder for growing data was made.
    """

    kind: str = ""
    finished: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    staging: str | None = None
    scratch: bool = False

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read a manifest; None where there is none.

        Raises:
            OutputError: it is damaged, or written by a newer version: nothing in its folder is known to be the tool's.
        """
        if not os.path.lexists(path):
            return None
        try:
            with _regular(path) as file:
                record = json.load(file)
            if record["format"] > FORMAT:
                raise OutputError(f"{path} was written by a newer cka-probe. Use that version, or name another folder.")
            entries = {
                _inside(name): Entry(
                    tuple(Content(int(one["size"]), str(one["sha256"])) for one in entry["contents"]),
                    str(entry["part"]),
                    bool(entry["grows"]),
                )
                for name, entry in record["entries"].items()
            }
            if not all(entry.contents for entry in entries.values()):
                raise ValueError("an entry has no content")
            staging = record["staging"]
            return cls(
                str(record["kind"]), bool(record["finished"]), entries,
                None if staging is None else _inside(staging), bool(record["scratch"]),
            )  # fmt: skip
        except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"{path} is damaged ({type(error).__name__}: {error}), so no file beside it can be replaced. Name "
                "another folder."
            ) from error

    def save(self, path: Path) -> None:
        """Write it, synced to the disk, in place of what was there."""
        write_synced(path, {"format": FORMAT, **asdict(self)})

    def add(self, name: str, content: Content, *, part: str, grows: bool = False) -> None:
        """List one more content of a file: the new one beside the old one."""
        known = self.entries[name].contents if name in self.entries else ()
        self.entries[name] = Entry((*(one for one in known if one != content), content), part, grows)

    def settle(self, name: str, content: Content) -> None:
        """List this content of a file alone."""
        self.entries[name] = replace(self.entries[name], contents=(content,))


def write_synced(path: Path, record: Any) -> None:
    """Write JSON, whole or not at all; it is on the disk when this returns."""
    aside = path.with_name(f"{path.name}.new")
    aside.unlink(missing_ok=True)  # of a process that died
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(aside, flags, 0o666), "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk, on systems that can."""
    with suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _regular(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, opened to be read; neither a link nor a pipe, which could make a reader wait for ever."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no regular file")
        yield file


def _inside(name: str) -> str:
    """A relative path that stays inside its folder, as it is."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"the path {name!r} leaves its folder")
    return str(path)
