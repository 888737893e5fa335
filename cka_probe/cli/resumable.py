"""What an interrupted command prints: how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cka_probe.runtime.interrupts import was_interrupted

if TYPE_CHECKING:
    from cka_probe.runtime.folder.run_folder import RunFolder


@contextmanager
def resumable(folder: RunFolder, command: str) -> Iterator[None]:
    """Within the block, an interrupt says how the run in the folder goes on, if it can."""
    try:
        yield
    except BaseException as stop:
        # A library may have turned the interrupt into an error of its own.
        if not (isinstance(stop, KeyboardInterrupt) or was_interrupted()):
            raise
        if folder.has_checkpoint:
            again = command if "--resume" in command.split() else f"{command} --resume"
            raise KeyboardInterrupt(f"interrupted. Go on with: {again}") from stop
        if folder.holds("similarity.npz") and not folder.holds("report.html"):
            raise KeyboardInterrupt(
                f"interrupted while the report was drawn. The results are in {folder.path}. Draw it with: cka-probe "
                f"report {folder.path}"
            ) from stop
        raise
