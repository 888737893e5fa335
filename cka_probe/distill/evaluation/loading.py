"""Labelled images as a network sees them, in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cka_probe.errors import DataError
from cka_probe.images.sources.files import naming_unreadable
from cka_probe.images.sources.source import ImageSource, read_labelled

if TYPE_CHECKING:
    from PIL.Image import Image


class PreparedImages(Dataset[Any]):
    """Images as a network sees them, with their labels; or the message of what is wrong with one.

    Args:
        images: labelled.
        transform: from an image to a tensor.
        mine: numbers of those that are read.
    """

    def __init__(self, images: ImageSource, transform: Callable[[Image], Tensor], mine: range) -> None:
        self._images, self._transform, self._mine = images, transform, mine

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | str:
        try:
            index = self._mine[position]
            image, label = read_labelled(self._images, index)
            with naming_unreadable(self._images.place(index)):
                return self._transform(image), label
        except DataError as error:
            return str(error)  # raised in a worker process, it would bring its traceback


def collate_labelled(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    """A batch of images and labels, or the first message."""
    good = []
    for item in items:
        if isinstance(item, str):
            return item
        good.append(item)
    inputs, labels = zip(*good, strict=True)
    return torch.stack(inputs), torch.tensor(labels)
