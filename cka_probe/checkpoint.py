"""last.ckpt and the one before it: written whole, checked when read, the earlier one used where the last is damaged."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cka_probe.errors import CheckpointError, OutputError
from cka_probe.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
FORMAT = 1


def save_checkpoint(folder: RunFolder, kind: str, state: Mapping[str, Any]) -> None:
    """Write the state as last.ckpt; the one that was there becomes previous.ckpt.

    Killed at any moment, at least one whole checkpoint remains.

    Args:
        folder: of the run.
        kind: of the run.
        state: of types that `torch.load` takes with ``weights_only=True``.

    Raises:
        OutputError: it cannot be written, as on a full disk; the checkpoints before it are as they were.
    """

    def write(path: Path) -> None:
        with path.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)

    try:
        folder.keep_checkpoint(kind, write, last=LAST, previous=PREVIOUS)
    except (OutputError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError on a full disk
        raise OutputError(
            f"The checkpoint in {folder.path} cannot be written: {error} Make room; --resume goes on from the one "
            "before it."
        ) from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state of last.ckpt, else of previous.ckpt (said in the log); None where there is neither.

    Raises:
        CheckpointError: both are damaged, or written by a newer version.
    """
    broken = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except (OSError, RuntimeError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            broken.append(f"{path}: {error}")
            continue
        if broken or name == PREVIOUS:
            why = "is damaged" if broken else "is not there"
            logger.warning("%s %s; going on from the checkpoint before it, %s.", folder / LAST, why, path)
        if state["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by a newer cka-probe (format {state['format']}).")
        return state
    if broken:
        raise CheckpointError(
            f"No checkpoint of {folder} can be read: {'; '.join(broken)}. Start anew with --overwrite."
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    # PyTorch reads over flipped bits; the archive's own checksums tell them.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the part {damaged} is damaged")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if "format" not in state:
        raise ValueError("it is no checkpoint of cka-probe")
    return state
