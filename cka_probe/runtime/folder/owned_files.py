"""Which files in a folder are the tool's own: it removes and replaces these, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cka_probe.runtime.folder.manifest import Content, Manifest

PRIVATE = ".cka-probe"
"""In the folder of a run: the manifest, the lock, checkpoints, and results that are being put together."""

RECORD = "run.yaml"
"""The record of a run. It appears last: a folder that holds it holds all results."""

RESULTS, REPORT, CHECKPOINT = "results", "report", "checkpoint"
"""The parts of a run's folder."""

CHECKPOINTS = ("last.ckpt", "previous.ckpt")
"""Names of the last checkpoint and of the one before it, in the private folder."""

_SCRATCH = "features"
_OF_OLD_RUNS = (RECORD, *CHECKPOINTS, "partial/last.ckpt", "metrics.csv")


class OwnedFiles:
    """The files of a folder that its manifest lists.

    Args:
        path: of the folder.
        option: that names it, for messages.

    Attributes:
        private: its private folder.
        known: the manifest; None where there is none yet.
    """

    def __init__(self, path: Path, option: str) -> None:
        self.path, self.private = path, path / PRIVATE
        self.known: Manifest | None = None
        self._option = option

    def load(self) -> None:
        """Read the manifest.

        Raises:
            OutputError: it is damaged.
        """
        self.known = Manifest.load(self.private / "manifest")

    def save(self) -> None:
        """Write the manifest, synced to the disk."""
        self.manifest.save(self.private / "manifest")

    @property
    def manifest(self) -> Manifest:
        """The manifest, a new one where there is none."""
        if self.known is None:
            self.known = Manifest()
        return self.known

    def names(self, part: str) -> list[str]:
        """The files of a part, as the tool wrote them last."""
        known = self.known.entries if self.known is not None else {}
        return [name for name, entry in known.items() if entry.part == part]

    def foreign(self) -> list[str]:
        """Names in the folder that the manifest does not list."""
        known = {Path(name).parts[0] for name in self.known.entries} if self.known is not None else set()
        there = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(path.name for path in there if path.name != PRIVATE and path.name not in known)

    def is_own(self, name: str) -> bool:
        """Whether a listed file is there as the tool wrote it, with no symbolic link on the way to it.

        In the private folder nobody else writes: a checkpoint may be damaged, and is replaced.
        """
        entry = self.known.entries.get(name) if self.known is not None else None
        path = self.path / name
        if entry is None or self._leads_out(name):
            return False
        return (path.is_file() and not path.is_symlink()) if name.startswith(f"{PRIVATE}/") else entry.matches(path)

    def is_old(self) -> bool:
        """Whether the folder holds a run of version 0.1, which kept no manifest."""
        return self.known is None and any((self.path / name).exists() for name in _OF_OLD_RUNS)

    def private_clashes(self) -> list[str]:
        """Names that checkpoints need in the private folder, and something else has."""
        names = [f"{PRIVATE}/{name}" for name in CHECKPOINTS]
        taken = [name for name in names if self.is_taken(name)]
        scratch = self.known is not None and self.known.scratch
        return taken + ([f"{PRIVATE}/{_SCRATCH}"] if os.path.lexists(self.private / _SCRATCH) and not scratch else [])

    def is_taken(self, name: str, new: Content | None = None) -> bool:
        """Whether something that is not the tool's has that name, and would be lost to the new content."""
        if self._leads_out(name):
            return True
        path = self.path / name
        if not os.path.lexists(path) or self.is_own(name):
            return False
        try:
            return new is None or Content.of(path) != new
        except OSError:
            return True

    def remove(self, names: Iterable[str], *, forget: bool = True) -> None:
        """Remove listed files that are unchanged; the others stay, and are the user's from now on.

        Args:
            names: of the files.
            forget: take them out of the manifest.
        """
        for name in names:
            if self.is_own(name):
                (self.path / name).unlink()
                for above in _folders_above(name):
                    if above.parts[0] != PRIVATE:
                        with suppress(OSError):  # it holds something else
                            (self.path / above).rmdir()
            if forget:
                self.manifest.entries.pop(name, None)

    def scratch(self) -> Path | None:
        """A private folder for data that grow; None where a folder of other origin has its name."""
        path = self.private / _SCRATCH
        if not self.manifest.scratch:
            if os.path.lexists(path):
                return None
            self.manifest.scratch = True
            self.save()
        path.mkdir(exist_ok=True)
        return path

    def clear_scratch(self) -> None:
        """Remove what `scratch` made."""
        if self.manifest.scratch:
            shutil.rmtree(self.private / _SCRATCH, ignore_errors=True)
            self.manifest.scratch = False

    def not_empty(self) -> str:
        """The message that the folder holds something of other origin."""
        if self.is_old():
            return (
                f"{self.path} holds a run of cka-probe 0.1, which kept no list of its files: it can be read and "
                f"reported on, but not resumed or overwritten. Name another folder ({self._option})."
            )
        held = listed(self.foreign())
        return f"{self._option} must be new or empty, but {self.path} holds {held}. Name another folder."

    def clash(self, names: list[str]) -> str:
        """The message that files are in the way."""
        if self.is_old():
            return self.not_empty()
        changed = [name for name in names if self.known is not None and name in self.known.entries]
        what = "were changed since cka-probe wrote them" if changed else "were not written by cka-probe"
        if len(changed or names) == 1:
            what = what.replace("were", "was", 1).replace("them", "it")
        return (
            f"{listed(changed or names)} in {self.path} {what}, and would be replaced. Move such files away, or name "
            "another folder."
        )

    def _leads_out(self, name: str) -> bool:
        return any((self.path / above).is_symlink() for above in _folders_above(name))


def listed(names: list[str]) -> str:
    """Names for a message: the first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _folders_above(name: str) -> list[Path]:
    """``a/b`` and ``a`` of ``a/b/c``."""
    return list(Path(name).parents)[:-1]
