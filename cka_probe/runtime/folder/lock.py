"""One run a folder: the lock that a run holds while it writes."""

from __future__ import annotations

import json
import os
import socket
import stat
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import ModuleType

from cka_probe.errors import OutputError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LONGEST = 4096  # bytes of a lock, well above what a host's name takes

_held: set[int] = set()
"""Descriptors of the locks of this process."""


class Lock:
    """An exclusive lock on a folder, held from `acquire` to `release`, or until the process dies.

    ``flock`` on a file. `remove` may take the file away while it is locked, so a lock on a removed file counts as none.
    A forked child does not hold it: worker processes outlive a parent that was killed, by seconds. On file systems
    without ``flock``, a file that only one process can create; it survives a process that is killed, and whether that
    happened is for the user to say.

    Args:
        path: of the file.
        folder: that it locks, for messages.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        self._descriptor: int | None = None
        self._created: Path | None = None

    def acquire(self) -> None:
        """Take the lock, without waiting for it.

        Raises:
            OutputError: another run holds it; the message names its host, process and start.
            OSError: the file cannot be made.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(self._path, flags, 0o666)
        try:
            if not _is_lock(descriptor):
                raise OutputError(f"{self._path} was not written by cka-probe. Move it away, or name another folder.")
            taken = self._flock(descriptor)
            if taken and not self._is_at_path(descriptor):
                raise OutputError(f"Another run has just left {self._folder}. Start this one again.")
            if taken:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _holder(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        if not taken:
            os.close(descriptor)
            self._create()
            return
        self._descriptor = descriptor
        _let_go_in_children()
        _held.add(descriptor)

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor in _held:  # a child has closed it
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        if self._created is not None:
            self._created.unlink(missing_ok=True)
        self._descriptor = self._created = None

    def remove(self) -> None:
        """Remove the file, which this process has locked."""
        with suppress(OSError):  # Windows removes no open files
            self._path.unlink()

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the file that is open is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self._path))
        except OSError:
            return False

    def _flock(self, descriptor: int) -> bool:
        """Whether the lock was taken; False where the file system has none."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self._in_use(self._path)} Wait for it to end, or name another folder.") from None
        except OSError:
            return False
        return True

    def _create(self) -> None:
        path = self._path.with_name(f"{self._path.name}.held")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise OutputError(
                f"{self._in_use(path)} If that run is dead, remove {path}; this file system has no locks."
            ) from None
        with open(descriptor, "wb") as file:
            file.write(_holder())
        self._created = path

    def _in_use(self, path: Path) -> str:
        who = ""
        with suppress(OSError, ValueError, LookupError, TypeError):
            holder = json.loads(path.read_bytes())
            who = f" (process {holder['process']} on {holder['host']}, since {holder['started']})"
        return f"Another run is writing into {self._folder}{who}."


def _is_lock(descriptor: int) -> bool:
    """Whether an open file is a lock, or empty: nothing else may be written over."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    content = os.read(descriptor, _LONGEST + 1)
    if not content:
        return True
    try:
        return bool(json.loads(content).keys() == json.loads(_holder()).keys())
    except (ValueError, AttributeError, RecursionError):
        return False


def _holder() -> bytes:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}).encode()


def _let_go_in_children() -> None:
    """From now on, a forked child closes the descriptors that it inherits."""
    global _registered
    if not _registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)
        _registered = True


_registered = False


def _close_all() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.pop())
