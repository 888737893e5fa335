"""Gram matrices of many batches in a file, where the layers of a batch do not come all at once."""

from __future__ import annotations

import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from cka_probe.errors import OutputError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.streaming import StreamingCKA, not_finite
from cka_probe.runtime.world import World


class _Place(NamedTuple):
    offset: int
    examples: int
    dtype: DTypeLike


class GramFile:
    """(n, n) Gram matrices of the layers of many batches, each as it came, bit for bit.

    They are written one after the other, and read again one at a time: neither takes memory.

    Args:
        folder: for the file, which vanishes with this object; that of the system's temporary files where None.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        self._batches: dict[int, dict[int, _Place]] = defaultdict(dict)
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it stays open as long as this object
        except OSError as error:
            raise self._unwritable(error) from error
        weakref.finalize(self, self._file.close)

    def write(self, first: int, layer: int, gram: Tensor) -> None:
        """Keep the matrix of a layer, by its index, for the batch that starts with the example ``first``.

        Raises:
            OutputError: the disk is full.
        """
        values = gram.cpu().contiguous().numpy()
        try:
            self._file.seek(self._end)
            self._file.write(values.data)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._batches[first][layer] = _Place(self._end, len(values), values.dtype)
        self._end += values.nbytes

    def batches(self) -> list[int]:
        """The numbers of the first examples of the batches, ascending."""
        return sorted(self._batches)

    def batch(self, first: int, device: torch.device) -> Sequence[Tensor]:
        """The matrices of a batch, in the order of the layers, each read when it is looked at."""
        return _Batch(self, [place for _, place in sorted(self._batches[first].items())], device)

    def read(self, place: _Place) -> Tensor:
        """One matrix, (n, n), on the CPU."""
        values = np.empty((place.examples, place.examples), place.dtype)
        self._file.seek(place.offset)
        self._file.readinto(values.data)
        return torch.from_numpy(values)

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"With --memory, Gram matrices are stored in a file, but "
            f"{self._folder or tempfile.gettempdir()} has no room for more than {self._end / 1e9:.1f} GB: {error}. "
            "Name another with --scratch."
        )


class StoredGrams:
    """Takes the place of a `StreamingCKA` while networks run one after the other: stores their Gram matrices in a file.

    Args:
        measure: whose matrices they are.
        labels: one a layer, for messages.
        file: where they wait.
    """

    def __init__(self, measure: StreamingCKA, labels: Sequence[str], file: GramFile) -> None:
        self._measure = measure
        self._labels = labels
        self._file = file
        self._grams: dict[int, Tensor] = {}  # on the CPU
        self._device = torch.device("cpu")  # where they were made

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way. Runs inside the forward hook."""
        # A copy that need not be waited for, as `update` does for all layers at once.
        gram = self._measure.gram(layer, features)
        self._device = gram.device
        self._grams[layer] = gram.to("cpu", non_blocking=True)

    def update(self, first: int) -> None:
        """Keep the batch of the networks that have run.

        Raises:
            FeatureError: the features of a layer are not finite. The measure would report it, but after all networks.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        for layer, gram in self._grams.items():
            if not torch.isfinite(gram.sum()):
                raise not_finite([self._labels[layer]])
            self._file.write(first, layer, gram)
        self._grams.clear()

    def put_together(self, device: torch.device) -> None:
        """Give the measure the batches, once all networks have run."""
        for first in self._file.batches():
            self._measure.add(self._file.batch(first, device), first)

    def settle(self, world: World) -> None:
        """As the measure."""
        self._measure.settle(world)

    def merge(self, world: World) -> None:
        """The measure has nothing yet: each process puts its own batches together."""

    def state(self, folder: Path) -> dict[str, Any]:
        """Nothing: networks that run in turn do so in one go."""
        return {}

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Nothing was kept."""


class _Batch(Sequence[Tensor]):
    def __init__(self, file: GramFile, places: Sequence[_Place], device: torch.device) -> None:
        self._file = file
        self._places = places
        self._device = device

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Batch(self._file, self._places[index], self._device)
        return self._file.read(self._places[index]).to(self._device)
