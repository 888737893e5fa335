"""Paths as a user writes them: what no file system takes is refused before any work. Importing this loads nothing."""

from __future__ import annotations

import os
from pathlib import Path

from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import shown

_NAME_BYTES, _PATH_BYTES = 255, 4096
"""What Linux's file systems take; those of other systems take no more of a name."""


def usable_path(text: str | Path, what: str) -> Path:
    """A path with its ``~`` expanded, which may exist or not.

    Args:
        text: as the user wrote it.
        what: it is called in messages: a flag.

    Raises:
        SpecError: it is empty, no UTF-8, too long, or holds a NUL byte.

    >>> usable_path("runs/first", "--out").name
    'first'
    """
    path = os.path.expanduser(str(text))
    if not path:
        raise SpecError(f"{what} must be a path, but is empty.")
    if "\0" in path:
        raise SpecError(f"{what} must be a path without NUL bytes, but is {shown(path)}.")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SpecError(
            f"{what} must be a path in UTF-8, but {shown(path)} holds other bytes. Rename it, or make a link to it."
        ) from None
    longest = max(len(part.encode()) for part in path.split(os.sep))
    if longest > _NAME_BYTES or len(path.encode()) > _PATH_BYTES:
        raise SpecError(
            f"{what} must be at most {_PATH_BYTES:,} bytes long, each name in it at most {_NAME_BYTES}, but "
            f"{shown(path)} is longer."
        )
    return Path(path)


def existing_folder(text: str | Path, what: str) -> Path:
    """A folder that is there.

    Raises:
        SpecError: it is not there, or is a file.
    """
    path = usable_path(text, what)
    if not os.path.exists(path):
        raise SpecError(f"The folder {path} does not exist ({what}).")
    if not os.path.isdir(path):
        raise SpecError(f"{what} must be a folder, but {path} is a file.")
    return path


def existing_file(text: str | Path, what: str, kind: str = "file") -> Path:
    """A file that is there; ``kind`` says of which kind it should be.

    Raises:
        SpecError: it is not there, or is a folder.
    """
    path = usable_path(text, what)
    if not os.path.exists(path):
        raise SpecError(f"The {kind} {path} does not exist ({what}).")
    if os.path.isdir(path):
        raise SpecError(f"{what} needs a file, but {path} is a folder.")
    return path
