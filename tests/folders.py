"""What a test sees of a run's folder."""

from __future__ import annotations

from pathlib import Path

from cka_probe.runtime.folder.run_folder import PRIVATE


def names(folder: Path) -> set[str]:
    """What lies in a folder, the tool's private folder aside."""
    return {path.name for path in folder.iterdir()} - {PRIVATE}


def files_below(folder: Path) -> list[str]:
    """All files below a folder, but the lock and the manifest: they stay, and hold nothing of a run."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files if path.name not in ("lock", "manifest")]
