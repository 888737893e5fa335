"""Files that may be anything: only regular ones are opened, and what their parsers raise fits into one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cka_probe.errors import CkaProbeError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """What was to be read is a folder, a named pipe, a socket or a device."""


def require_regular(path: str | Path) -> None:
    """Raise a NotRegularError where a path, its links followed, is no regular file.

    To open a named pipe is to wait for somebody who writes into it, for ever.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise NotRegularError(f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")


def reason(error: BaseException) -> str:
    r"""Why something failed, in one line: the error's type, unless it is ours, and the first line of its message.

    >>> reason(ValueError("no number\nat all")), reason(MemoryError())
    ('ValueError: no number', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    kind = type(error)
    name = f"{kind.__module__}.error" if kind.__name__ == "error" else kind.__name__  # such as zlib.error
    if not lines:
        return name
    return lines[0] if isinstance(error, (CkaProbeError, NotRegularError)) else f"{name}: {lines[0]}"
