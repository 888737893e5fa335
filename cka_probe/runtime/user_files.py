"""``path/file.py:name``: what a Python file of the user's own defines."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.runtime.user_code import describe_error, keeping_globals

_SHOWN = 5


def is_user_file(spec: str) -> bool:
    """Whether a spec has the form ``path/file.py:name``."""
    return re.search(r"\.py:\w+$", spec) is not None


def code_sha256(spec: str) -> str:
    """The start of the SHA-256 of the file that ``path/file.py:name`` names, by which a changed file is known."""
    path = Path(spec.rpartition(":")[0]).expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextmanager
def user_callable(spec: str, what: str) -> Iterator[Callable[..., Any]]:
    """What ``path/file.py:name`` names; within the block, its file's own imports are found as if it were run there.

    What the file and the code of the block do to random states, PyTorch's modes and the working directory is undone.

    Args:
        spec: the file and the name.
        what: it is meant to be, for messages: ``"factory"``, ``"view"``.

    Raises:
        SpecError: there is no such file, it cannot be imported, or nothing in it that can be called has the name.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise SpecError(f"The file of a {what} must exist, but {file} does not.")
    search, folder = list(sys.path), Path.cwd()
    with ExitStack() as stack:
        stack.callback(sys.path.__setitem__, slice(None), search)
        stack.callback(os.chdir, folder)
        stack.enter_context(keeping_globals())
        try:
            module = _import(path.resolve())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's file may raise anything, SystemExit too
            raise SpecError(f"{file} could not be imported: {describe_error(error)}") from error
        found = getattr(module, name, None)
        if not callable(found):
            names = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
            close = difflib.get_close_matches(name, names, n=_SHOWN, cutoff=0.3)
            how = "it cannot be called" if hasattr(module, name) else "does not"
            hint = f" Close names: {', '.join(close)}." if close else ""
            raise SpecError(f"{file} must define {name!r}, but {how}.{hint}")
        yield found


def _import(path: Path) -> ModuleType:
    """A file as a module; as part of its package where it lies in one, so that relative imports work."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    for folder in (str(Path.cwd()), str(root)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if len(parts) > 1:
        name = ".".join(parts)
        found = importlib.import_module(name)
        if found.__file__ is None or Path(found.__file__).resolve() != path:
            raise ImportError(f"the package name {name!r} is taken by {found.__file__}; run from its own process")
        return found
    spec = importlib.util.spec_from_file_location(f"cka_probe_user_{path.stem}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module
