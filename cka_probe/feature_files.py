"""Safetensors files by parts: written a batch of rows at a time, and read from disk row by row.

The library of that name reads and writes whole tensors; the layout is one line of JSON before the plain numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import CheckpointError

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, read from disk when they are used.

    Raises:
        ValueError: it is no such file, or holds numbers of another type.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
    if unknown:
        raise ValueError(f"its numbers must be of the types {', '.join(_DTYPES)}, but are {', '.join(unknown)}")
    return {
        key: np.memmap(path, _DTYPES[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        for key, entry in header.items()
    }


class FeatureFile:
    """A safetensors file that is written a batch of rows at a time, so that its features need no memory.

    Args:
        path: of the file; where there is one, it must have been begun with the same rows, layers and metadata.
        rows: examples that will come.
        widths: layer -> its number of features.
        metadata: texts by name, for the header.

    Raises:
        CheckpointError: the file that is there is another one.
    """

    def __init__(self, path: Path, rows: int, widths: Mapping[str, int], metadata: Mapping[str, str]) -> None:
        offset = 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._starts: dict[str, tuple[int, int]] = {}
        for layer, width in widths.items():
            size = 4 * rows * width
            header[layer] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [offset, offset + size]}
            self._starts[layer] = offset, 4 * width
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns its data
        self._base = 8 + len(text)
        text = len(text).to_bytes(8, "little") + text
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "x+b")
        if path.stat().st_size:
            if self._file.read(self._base) != text or path.stat().st_size != self._base + offset:
                raise CheckpointError(f"{path} is not the file that was begun. Start anew with --overwrite.")
            return
        self._file.write(text)
        self._file.truncate(self._base + offset)

    def write(self, layer: str, first: int, features: NDArray[np.float32]) -> None:
        """Put (k, d) features into the rows from ``first`` on."""
        start, row = self._starts[layer]
        self._file.seek(self._base + start + first * row)
        self._file.write(np.ascontiguousarray(features, dtype="<f4").tobytes())

    def sync(self) -> None:
        """See that what was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
