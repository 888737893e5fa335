"""Weights of networks in files, so that they take no memory while other networks run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from cka_probe.errors import OutputError


class WeightOffload:
    """Keeps the weights of networks in files while others run. A network that was never offloaded stays in memory.

    Args:
        folder: for the files, which vanish with this object; that of the system's temporary files where None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._paths: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
        self._numbers = count()

    def offload(self, network: nn.Module) -> None:
        """Move the weights of a network that nobody else uses to a file. It keeps their shapes, and runs only `loaded`.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            if self._files is None:
                if self._folder is not None:
                    Path(self._folder).mkdir(parents=True, exist_ok=True)
                self._files = tempfile.TemporaryDirectory(prefix="cka-probe-", dir=self._folder)
                finalize(self, self._files.cleanup)
            path = Path(self._files.name) / f"{next(self._numbers)}.pt"
            torch.save([tensor.detach() for tensor in _tensors(network)], path)
        except (OSError, RuntimeError) as error:  # torch.save() raises the latter where the disk is full
            raise OutputError(
                f"With --memory, the weights of networks wait in files, but "
                f"{self._folder or tempfile.gettempdir()} has no room for them: {error}. Name another with --scratch."
            ) from error
        self._paths[network] = path
        _empty(network)

    @contextmanager
    def loaded(self, network: nn.Module) -> Iterator[None]:
        """Within the block, the network has its weights. Changes to them are lost after it."""
        path = self._paths.get(network)
        if path is None:
            yield
            return
        for tensor, values in zip(_tensors(network), torch.load(path, weights_only=True), strict=True):
            tensor.data = values
        try:
            yield
        finally:
            _empty(network)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, in a fixed order."""
    return [*network.parameters(), *network.buffers()]


def _empty(network: nn.Module) -> None:
    for tensor in _tensors(network):
        tensor.data = torch.empty((), dtype=tensor.dtype).expand(tensor.shape)  # of that shape, in the memory of one
