"""last.ckpt and the one before it: written whole, checked when read, the earlier one used where the last is damaged."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from cka_probe.errors import CheckpointError, OutputError
from cka_probe.runtime.files import reason, require_regular
from cka_probe.runtime.folder.owned_files import CHECKPOINTS
from cka_probe.runtime.folder.run_folder import RunFolder
from cka_probe.runtime.records import Shape, misfit

logger = logging.getLogger(__name__)

LAST, PREVIOUS = CHECKPOINTS
FORMAT = 1

COMPARISON: Shape = {
    "settings": {str: object}, "seconds": float, "batches": int, "probes": [{"ways": {}, "features": {str: int}}],
    "measures": {str: {}},
}  # fmt: skip
"""What a checkpoint of a comparison or an extraction holds: see `cka_probe.runtime.records.Shape`."""

DISTILLATION: Shape = {
    "command": str, "made_of?": {str: str}, "config": {str: object}, "position": [int, int], "history": [{str: object}],
    "sums": {"names": [str], "count": int}, "decision": ([object, object, object], None), "teacher?": ([object], None),
    "guard?": ({str: object}, None), "images?": {str: int}, "seconds": float, "probe_seconds": float,
}  # fmt: skip
"""What a checkpoint of a distillation holds, beside the state of its training."""


Which = Literal["last", "previous"]
"""Of the two checkpoints, the one to go on from."""


def save_checkpoint(folder: RunFolder, kind: str, state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write the state as last.ckpt; the one that was there becomes previous.ckpt.

    Killed at any moment, at least one whole checkpoint remains.

    Args:
        folder: of the run.
        kind: of the run.
        state: of types that `torch.load` takes with ``weights_only=True``.
        keep_previous: the run went on from previous.ckpt, which stays; last.ckpt is replaced.

    Raises:
        OutputError: it cannot be written, as on a full disk; the checkpoints before it are as they were.
    """
    folder.keep_checkpoint(kind, lambda path: write_checkpoint(path, state), keep_previous=keep_previous)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state into a new file.

    Raises:
        OutputError: it cannot be written, as on a full disk.
    """
    try:
        with path.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError on a full disk
        raise OutputError(
            f"A checkpoint cannot be written: {reason(error)}. Make room; --resume goes on from the one before it."
        ) from error


def load_checkpoint(folder: Path, shape: Shape, which: Which = "last") -> dict[str, Any] | None:
    """The state of last.ckpt, else of previous.ckpt (said in the log); None where there is neither.

    Args:
        folder: of the run.
        shape: what the state must hold.
        which: ``"previous"``: that of previous.ckpt alone.

    Raises:
        CheckpointError: both are damaged, or written by a newer version; there is no previous one.
    """
    if which == "previous" and (folder / LAST).exists() and not (folder / PREVIOUS).exists():
        raise CheckpointError(f"{folder} holds no checkpoint before the last one. Resume from the last.")
    broken = []
    for name in (PREVIOUS,) if which == "previous" else (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = _read(path, shape)
        except Exception as error:  # of a damaged or foreign file, the readers of zip and pickle raise anything
            broken.append(f"{path}: {reason(error)}")
            continue
        if which == "last" and name == PREVIOUS:
            why = "is damaged" if broken else "is not there"
            logger.warning("%s %s; going on from the checkpoint before it, %s.", folder / LAST, why, path)
        if state["format"] > FORMAT:
            raise CheckpointError(f"{path} was written by a newer cka-probe (format {state['format']}).")
        return state
    if broken:
        raise CheckpointError(
            f"No checkpoint of {folder} can be read: {'; '.join(broken)}. Start over with --overwrite."
        )
    return None


def _read(path: Path, shape: Shape) -> dict[str, Any]:
    require_regular(path)
    require_whole(path)
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise CheckpointError("it is no checkpoint of cka-probe")
    wrong = misfit(state, shape, "its state") if state["format"] <= FORMAT else ""
    if wrong:
        raise CheckpointError(f"it is no checkpoint of such a run: {wrong}")
    return state


def require_whole(path: Path) -> None:
    """Raise a CheckpointError where the parts of a zip archive, as `torch.save` writes it, differ from their checksums.

    PyTorch reads over flipped bits.
    """
    with zipfile.ZipFile(path) as archive:
        if not any(part.CRC for part in archive.infolist()):
            return  # saved without any: torch.serialization.set_crc32_options(False)
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"its part {damaged} is damaged")
