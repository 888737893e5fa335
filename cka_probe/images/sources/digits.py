"""scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.images.sources.folder import canonical_split

if TYPE_CHECKING:
    from PIL.Image import Image


def digits(split: str | None = None) -> tuple[list[Image], list[int]]:
    """scikit-learn's handwritten digits, as 8 × 8 gray images, and their labels.

    Args:
        split: ``"validation"`` every fifth, 359; ``"train"`` the others, 1438; None all, 1797.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    held_out = np.arange(len(bunch.images)) % 5 == 4
    keep = {"validation": held_out, "train": ~held_out, None: np.full(len(held_out), True)}.get(split)
    if keep is None:
        raise SpecError(f"The digits have the splits 'train' and 'validation', but got {split!r}.")
    pixels = np.round(bunch.images[keep] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], bunch.target[keep].tolist()


class Digits:
    """The digits as an image source.

    Args:
        split: as for `digits`, by any of its names.
        name: of the source.
    """

    classes = tuple(map(str, range(10)))
    in_memory = True

    def __init__(self, split: str | None = None, name: str = "digits") -> None:
        part = canonical_split(split)
        self._images, self._labels = digits(part)
        self._split = part or "all"
        self.name = name

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image, int]:
        """An 8 × 8 gray image, and the digit that it shows."""
        return self._images[index], self._labels[index]

    def identity(self, index: int) -> str:
        """The part and the number of an image."""
        return f"digits/{self._split}/{index}"

    def place(self, index: int) -> str:
        """What messages call an image."""
        return self.identity(index)
