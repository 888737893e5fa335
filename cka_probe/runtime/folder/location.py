"""Where a run's folder may be, and what kind of run a folder holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cka_probe.errors import OutputError
from cka_probe.runtime.folder.manifest import Manifest
from cka_probe.runtime.folder.owned_files import PRIVATE

_LONGEST_NAME = 255  # bytes, on all common file systems


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
            raise OutputError(f"{option} must have names of at most {_LONGEST_NAME} bytes, but {text[:40]}… is longer.")
        if PRIVATE in path.parts:
            raise OutputError(f"{option} must not lie in a {PRIVATE} folder, which belongs to a run, but is {path}.")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{option} must be a folder, but {path} is a file.")
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, a NUL, a loop of links, no such user's home
        raise OutputError(f"{option} must name a folder, but {text[:80]!r} cannot be one: {error}") from error
    return path


def linked(path: Path, other: Path) -> None:
    """Give a file a second name; on file systems that have no such thing, a copy."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def kind_of(folder: Path) -> str | None:
    """The kind of run that a folder holds, finished or not, as its manifest says; None without one.

    Raises:
        OutputError: the manifest is damaged.
    """
    known = Manifest.load(folder / PRIVATE / "manifest")
    return known.kind if known is not None else None
