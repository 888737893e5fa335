"""Images of 12 bits in files of 16, which come out almost black."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.images.sources.bit_depth import WHITE, is_16_bit
from cka_probe.images.sources.datasets import DatasetImages
from cka_probe.images.sources.files import READ_ERRORS
from cka_probe.images.sources.folder import Folder
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.streams import Shards
from cka_probe.images.sources.subset import origin

logger = logging.getLogger(__name__)

_LOOKED_AT = 8
_TWELVE_BITS = 4096


def warn_if_dark(source: ImageSource, indices: NDArray[np.int64] | None = None) -> None:
    """Log a warning if the first images have 16 bits, but no value of 4096 or more, and no ``full_scale`` was given.

    If the first image is none of 16 bits, no other one is decoded. Of sources that can only be read once, none is.

    Args:
        source: of the images.
        indices: which of them will be used, in order; all by default.
    """
    first = np.arange(min(len(source), _LOOKED_AT)) if indices is None else indices[:_LOOKED_AT]
    stored, numbers = origin(source, first)
    if not isinstance(stored, (Folder, DatasetImages, Shards)) or stored.full_scale is not None:
        return
    brightest = -1
    for number in numbers.tolist():
        try:
            image = stored.original(number)
            if isinstance(image, Tensor) or not is_16_bit(image):
                return
            brightest = max(brightest, int(np.asarray(image).max()))
        except READ_ERRORS:
            return  # the one who uses the image says what is wrong with it
        if brightest >= _TWELVE_BITS:
            return
    if brightest >= 0:
        logger.warning(
            "The images of %s are almost black: they have 16 bits, where %s is white, but no pixel of the first %d is "
            "above %s. If white is 4095, as with 12 bits, use --full-scale 4095 (in Python, full_scale=4095).",
            source.name, f"{WHITE:,}", len(numbers), f"{brightest:,}",
        )  # fmt: skip
