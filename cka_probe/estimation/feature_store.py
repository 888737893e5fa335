"""The features of all layers for all examples: in memory up to a budget, beyond it in memory-mapped files."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from cka_probe.errors import CheckpointError, FeatureError, OutputError
from cka_probe.estimation.arrays import LayerFeatures
from cka_probe.estimation.gram import Features
from cka_probe.runtime.world import World

BUDGET_BYTES = 3 << 30
"""What is kept in memory: 24 layers of 10,000 examples, with a matrix of their dissimilarities each."""


class Scratch:
    """Arrays in memory until the budget is spent, then in memory-mapped files that vanish with this object.

    Args:
        folder: for the files; that of the system's temporary files where None.
        budget: bytes.

    Raises:
        OutputError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path | None = None, budget: int = BUDGET_BYTES) -> None:
        if folder is not None:  # reported at once, and not when the memory is spent
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise OutputError(
                    f"The folder for features (--scratch) must be one that can be written: {error}."
                ) from error
        self._folder = folder
        self._left = budget
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array to be filled; its place is free again once nothing refers to it.

        Raises:
            OutputError: the folder cannot be written.
        """
        size = prod(shape) * np.dtype(dtype).itemsize
        if size <= self._left:
            self._left -= size
            array = np.empty(shape, dtype)
            weakref.finalize(array, self._give_back, size)
            return array
        try:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="cka-probe-", dir=self._folder)
                weakref.finalize(self, self._files.cleanup)
            self._count += 1
            path = Path(self._files.name) / f"{self._count}.bin"
            _reserve(path, size)
            mapped = np.memmap(path, dtype, "r+", shape=shape)
            weakref.finalize(mapped, _remove, path)
            return mapped
        except OSError as error:
            raise OutputError(
                f"{size / 2**30:.1f} GiB of features exceed the memory limit and must be written to a folder, but "
                f"{self._folder or tempfile.gettempdir()} cannot hold them: {error}. Name another with --scratch."
            ) from error

    def _give_back(self, size: int) -> None:
        self._left += size


def _reserve(path: Path, size: int) -> None:
    """Make a file of that size whose space is taken at once.

    A file with holes is full before it is: the system ends a process that writes into the mapping of a full disk.
    """
    with path.open("xb") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    _remove(path)
                    raise  # all others say that the file system cannot reserve


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class FeatureStore:
    """What collected measures share: (n, d) features of every layer, the examples in the order of the run.

    They are kept in float32, those that come in float64 in that.

    Args:
        labels: one a layer, for messages.
        examples: how many there will be at most.
        scratch: where they lie.
    """

    def __init__(self, labels: Sequence[str], examples: int, scratch: Scratch) -> None:
        self._labels = labels
        self.examples = examples
        self.scratch = scratch
        self._batch: dict[int, Tensor] = {}
        self._device = torch.device("cpu")
        self._layers: dict[int, NDArray[Any]] = {}
        self._epsilon: dict[int, float] = {}
        self.filled = 0
        self._spans: dict[int, int] = {}  # number of a batch's first example -> its size; of those that lie here alone

    @property
    def has_all_layers(self) -> bool:
        """Whether something of each layer is there."""
        return len(self._layers) == len(self._labels)

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way; a second time changes nothing."""
        if layer not in self._batch:
            # A copy that need not be waited for, as `update` does for all layers at once.
            pooled = features.pooled.detach()
            kept = torch.float64 if pooled.dtype == torch.float64 else torch.float32
            self._batch[layer] = pooled.to("cpu", kept, non_blocking=True, copy=True)
            self._device = features.x.device
            self._epsilon[layer] = max(features.epsilon, torch.finfo(kept).eps)

    def update(self, first: int) -> None:
        """Add the batch; once more, before the next `prepare`, changes nothing.

        Args:
            first: the number of its first example.

        Raises:
            FeatureError: the features of a layer are not finite.
        """
        if not self._batch:
            return
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        size = len(next(iter(self._batch.values())))
        for layer, features in self._batch.items():
            if not torch.isfinite(features).all():
                kept = str(features.dtype).removeprefix("torch.")
                raise FeatureError(
                    f"The features of every layer must be finite in {kept}, but those of {self._labels[layer]} hold "
                    "NaN or infinity. Check the weights and the preprocessing of that model, or select other layers."
                )
            if layer not in self._layers:
                self._layers[layer] = self.scratch.empty((self.examples, features.shape[1]), features.numpy().dtype)
            self._layers[layer][first : first + size] = features.numpy()
        self._spans[first] = size
        self.filled = max(self.filled, first + size)
        self._batch.clear()

    def merge(self, world: World) -> None:
        """Move the features that all processes have to rank 0; once more, it changes nothing."""
        if world.size == 1:
            return
        received: dict[int, int] = {}
        for layer in range(len(self._labels)):
            own = {first: self._rows(layer, first, size) for first, size in self._spans.items()}
            for first, rows in world.blocks_to_first(own):
                self._layers[layer][first : first + len(rows)] = rows.numpy()
                received[first] = len(rows)
        self._spans = self._spans | received if world.writes else {}
        self.filled = max([self.filled, *(first + size for first, size in received.items())])

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs; the features that came since the last time are written to the folder.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            for layer, features in self._layers.items():
                path = _saved(folder, layer)
                with path.open("r+b" if path.exists() else "wb") as file:
                    for first, size in self._spans.items():
                        file.seek(first * features.shape[1] * features.itemsize)
                        file.write(features[first : first + size].tobytes())
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"The features so far cannot be written to {folder}: {error}. Make room.") from error
        self._spans = {}
        return {
            "filled": self.filled,
            "widths": {layer: features.shape[1] for layer, features in self._layers.items()},
            "epsilons": dict(self._epsilon),
            "dtypes": {layer: features.dtype.name for layer, features in self._layers.items()},
        }

    def load(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from what `state` gave and wrote.

        Raises:
            CheckpointError: what it wrote is not there any more.
        """
        if self.filled:  # another measure that shares the store has done it
            return
        self.filled = state["filled"]
        self._epsilon = dict(state["epsilons"])
        for layer, width in state["widths"].items():
            path, dtype = _saved(folder, layer), state["dtypes"][layer]
            try:
                saved = np.memmap(path, dtype, "r", shape=(self.filled, width))
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"The features of the first {self.filled} images must be in {path}, but cannot be read: {error}. "
                    "Start over with --overwrite."
                ) from error
            self._layers[layer] = self.scratch.empty((self.examples, width), dtype)
            self._layers[layer][: self.filled] = saved

    def _rows(self, layer: int, first: int, size: int) -> Tensor:
        return torch.from_numpy(self._layers[layer][first : first + size])

    def widths(self) -> list[int]:
        """The number of features of each layer, in the order of their indices."""
        return [self._layers[i].shape[1] for i in sorted(self._layers)]

    def layers(self) -> list[LayerFeatures]:
        """The features so far, in the order of the layers' indices."""
        return [LayerFeatures.of(self._layers[i][: self.filled], self._epsilon[i]) for i in sorted(self._layers)]


def _saved(folder: Path, layer: int) -> Path:
    return folder / f"features-{layer}.bin"
