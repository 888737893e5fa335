"""From pixels of any depth to 8 bits a channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from cka_probe.errors import DataError
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from PIL.Image import Image

FULL_SCALE = Range(open_low=True, optional=True)
"""What ``full_scale`` may be: the pixel value that is white, None for that of the file's depth."""

WHITE = 65535
"""The pixel value that is white in files of 16 bits, unless another is given."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's names of 8-bit images, by the number of their channels; 2 and 4 are with opacity (alpha)."""

_AT_MOST_16_BITS = ("PNG", "PPM")
"""Formats whose gray images never have more than 16 bits, which some of Pillow's readers return with 32."""


def is_16_bit(image: Image) -> bool:
    """Whether a gray image has 16 bits a pixel."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in _AT_MOST_16_BITS)


def in_8_bits(image: Image, full_scale: float | None = None) -> Image:
    """The image with 8 bits a channel: ``round(255 * value / full_scale)``, values outside 0 to full_scale clipped.

    An image that has 8 bits already is returned as it is, whatever ``full_scale``. Colour images always have: Pillow
    itself keeps the higher 8 of the 16 bits of a colour file. It also scales a PGM file that states a maximum of its
    own to 65535.

    Args:
        image: of any mode.
        full_scale: the pixel value that is white, above 0; by default 65535 for 16 bits, which is ``value / 257``.

    Raises:
        SpecError: full_scale is no finite number above 0.
        ValueError: pixels of 32 bits, or floating-point ones, without full_scale; or some of them are NaN.
    """
    from PIL.Image import fromarray

    FULL_SCALE.check("--full-scale", full_scale)
    if is_16_bit(image):
        white = WHITE if full_scale is None else full_scale
    elif image.mode not in ("I", "F"):
        return image
    elif full_scale is None:
        raise ValueError(
            f"pixels of mode {image.mode!r} have no known range; give the value that is white (--full-scale), or save "
            "the image with 8 or 16 bits"
        )
    else:
        white = full_scale
    values = np.asarray(image, dtype=np.float64)  # Pillow's own conversion clips all of them at 255
    if np.isnan(values).any():
        raise ValueError("some of its pixels are NaN")
    return fromarray(np.rint(values.clip(0, white) / white * 255).astype(np.uint8))


def has_opacity(image: Image) -> bool:
    """Whether an image has opacity (alpha), also if it is in its palette."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def as_mode(image: Image, mode: str) -> Image:
    """The image with the channels of another mode, 8 bits each.

    Args:
        image: of any mode. One that comes from no source of ours may have 16 bits.
        mode: one of `MODES`.

    Raises:
        ValueError: as for `in_8_bits`.
        DataError: the image has no such channels: none of them is made up.
    """
    if mode not in MODES.values():
        raise DataError("images have 1 to 4 channels, but the network takes another number of them (in_chans)")
    image = in_8_bits(image)
    if mode in ("LA", "RGBA") and not has_opacity(image):
        raise DataError(
            f"the network takes {len(mode)} channels, the last of them opacity (alpha), but the image has none (its "
            f"mode is {image.mode}). Use images of mode {mode}, or a network of {len(mode) - 1} channels (in_chans)"
        )
    if isinstance(image.info.get("transparency"), bytes) and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns of other conversions, which give the same colours
    return image.convert(mode)


def on_colours(function: Callable[..., Image], image: Image, *args: Any, **options: Any) -> Image:
    """An operation on the colours of an image with opacity, which stays: Pillow's own are of gray and RGB alone."""
    if image.mode not in ("LA", "RGBA"):
        return function(image, *args, **options)
    changed = function(image.convert(image.mode[:-1]), *args, **options)
    changed.putalpha(image.getchannel("A"))
    return changed
