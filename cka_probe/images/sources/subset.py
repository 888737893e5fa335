"""Some of the images of a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.images.sources.decoded import Decoded
from cka_probe.images.sources.source import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image


class Subset:
    """Some of the images of a source, as a source.

    Attributes:
        source: all of the images.
        indices: which, in order; (n,) int64.
        name: of the part.
        classes: those of the source.
        in_memory: as for the source.
    """

    def __init__(self, source: ImageSource, indices: NDArray[np.int64], name: str) -> None:
        self.source = source
        self.indices = indices
        self.name = name
        self.classes = source.classes
        self.in_memory = source.in_memory

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image | Tensor, int | None]:
        """As for the source."""
        return self.source.read(int(self.indices[index]))

    def identity(self, index: int) -> str:
        """As in the source."""
        return self.source.identity(int(self.indices[index]))

    def place(self, index: int) -> str:
        """As in the source."""
        return self.source.place(int(self.indices[index]))


def origin(source: ImageSource, indices: NDArray[np.int64]) -> tuple[ImageSource, NDArray[np.int64]]:
    """The source that images are read from in the end, and their numbers there.

    Args:
        source: a subset, images held in memory, or any other source.
        indices: numbers of images in it.
    """
    found = indices
    while isinstance(source, (Subset, Decoded)):
        found = source.indices[found] if isinstance(source, Subset) else found
        source = source.source
    return source, found
