"""Images that are decoded once and held in memory."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from cka_probe.images.sources.bit_depth import MODES, as_mode, has_opacity
from cka_probe.images.sources.source import ImageSource, read_labelled

if TYPE_CHECKING:
    from PIL.Image import Image

_LOOKED_AT = 8


class Decoded:
    """Labelled images in one array of bytes: worker processes share it, and forking copies none of it.

    Args:
        source: of the images, all of which are read.
        fingerprint: of the source, taken before.

    Raises:
        DataError: an image cannot be read, or has no label.
    """

    in_memory = True

    def __init__(self, source: ImageSource, fingerprint: str) -> None:
        self.source = source
        self.name = source.name
        self.classes = source.classes
        self.fingerprint = fingerprint
        buffer, labels, shapes = BytesIO(), [], []
        for index in range(len(source)):
            image, label = read_labelled(source, index)
            if image.mode not in MODES.values():
                image = as_mode(image, "RGBA" if has_opacity(image) else "RGB")
            pixels = np.asarray(image)
            buffer.write(pixels.tobytes())
            shapes.append((*pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1))
            labels.append(label)
        self._bytes = np.frombuffer(buffer.getbuffer(), dtype=np.uint8)
        self._shapes = np.array(shapes)
        self._ends = self._shapes.prod(1).cumsum()
        self._labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Image, int]:
        """An image of one of `MODES`, and its label."""
        from PIL.Image import fromarray

        rows, columns, channels = self._shapes[index]
        end = self._ends[index]
        shape = (rows, columns, channels) if channels > 1 else (rows, columns)
        pixels = self._bytes[end - rows * columns * channels : end].reshape(shape)
        return fromarray(pixels), int(self._labels[index])

    def identity(self, index: int) -> str:
        """As in the source."""
        return self.source.identity(index)

    def place(self, index: int) -> str:
        """As in the source."""
        return self.source.place(index)


def decoded_bytes(source: ImageSource) -> float:
    """How many bytes the decoded images of a source take, judged by a few spread over them.

    Raises:
        DataError: one of these cannot be read.
    """
    images = [read_labelled(source, int(i))[0] for i in np.linspace(0, len(source) - 1, _LOOKED_AT)]
    sizes = [image.width * image.height * (4 if has_opacity(image) else 3) for image in images]
    return len(source) * float(np.mean(sizes))
