"""Safetensors files by parts: written a batch of rows at a time, and read from disk row by row.

The library of that name writes whole tensors; the layout is one line of JSON before the plain numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.errors import CheckpointError, DataError, OutputError
from cka_probe.runtime.files import require_regular
from cka_probe.runtime.names import quoted, unquoted

_DTYPES = ("F64", "F32", "F16", "BF16")


def mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, read from disk when they are used; bfloat16 as float32.

    Raises:
        DataError: it is no such file, or damaged; it holds numbers of another type, or two arrays of one name.
        OSError: it cannot be read, or is no regular file.
    """
    from safetensors import SafetensorError, safe_open

    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:  # its tensors lie in a mapping of the file
            dtypes = {key: file.get_slice(key).get_dtype() for key in _names(path)}
            unknown = sorted(set(dtypes.values()) - set(_DTYPES))
            if unknown:
                raise DataError(f"its numbers must be of the types {', '.join(_DTYPES)}, but are {', '.join(unknown)}")
            tensors = {unquoted(key): file.get_tensor(key) for key in dtypes}
    except SafetensorError as error:
        raise DataError(f"it is no safetensors file, or damaged ({str(error).splitlines()[0]})") from error
    return {name: _as_array(tensor) for name, tensor in tensors.items()}


def _as_array(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return BFloat16(tensor)
    array = tensor.numpy()
    array.setflags(write=False)
    return array


class BFloat16:
    """As much of an array as stored features need, for numbers that NumPy has no type for: rows become float32."""

    dtype = np.dtype(np.float32)
    epsilon = torch.finfo(torch.bfloat16).eps

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def __len__(self) -> int:
        return len(self._tensor)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._tensor[rows].float().numpy()
        return found


def _names(path: Path) -> list[str]:
    """The names in the header of a file that the library has read, in their order, which it does not keep.

    Raises:
        DataError: one stands twice: the library takes the last, others might not.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    pairs: list[tuple[str, Any]] = json.loads(header, object_pairs_hook=list)
    names = [name for name, _ in pairs if name != "__metadata__"]
    double = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if double is not None:
        raise DataError(f"{double!r} stands twice in its header")
    return names


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
            header[quoted(layer)] = {"dtype": "F32", "shape": [rows, width], "data_offsets": [offset, offset + size]}
            self._starts[layer] = offset, 4 * width
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format aligns its data
        self._base = 8 + len(text)
        text = len(text).to_bytes(8, "little") + text
        self._path = path
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "x+b")
        if path.stat().st_size:
            if self._file.read(self._base) != text or path.stat().st_size != self._base + offset:
                raise CheckpointError(f"{path} is not the file that was begun. Start over with --overwrite.")
            return
        self._file.write(text)
        self._file.truncate(self._base + offset)

    def write(self, layer: str, first: int, features: NDArray[np.float32]) -> None:
        """Put (k, d) features into the rows from ``first`` on.

        Raises:
            OutputError: the disk is full; so for `sync` and `close`.
        """
        start, row = self._starts[layer]
        with self._on_disk():
            self._file.seek(self._base + start + first * row)
            self._file.write(np.ascontiguousarray(features, dtype="<f4").tobytes())

    def sync(self) -> None:
        """See that what was written is on the disk."""
        with self._on_disk():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is not written yet, and close the file."""
        with self._on_disk():
            self._file.close()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"The features cannot be written to {self._path}: {error}. Make room.") from error
