"""Pixels of 16 bits are divided by 257, those of other depths by the value that is white; 8 bits stay as they are."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cka_probe.errors import SpecError
from cka_probe.images.sources.bit_depth import as_mode, in_8_bits, is_16_bit
from cka_probe.images.sources.files import read_image

ALL_GRAYS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
DIVIDED = np.floor(ALL_GRAYS / 257 + 0.5)
"""No gray lies halfway between two: 257 is odd."""


def as_file(values: NDArray[Any], kind: str) -> Image.Image:
    """16-bit values as they are read back from a file."""
    file = BytesIO()
    if kind == "plain pgm":
        rows = "\n".join(" ".join(map(str, row)) for row in values.tolist())
        file.write(f"P2 {values.shape[1]} {values.shape[0]} 65535\n{rows}\n".encode())
    else:
        image = Image.fromarray(values.astype(">u2" if kind == "big-endian tiff" else "<u2"))
        image.save(file, {"png": "PNG", "pgm": "PPM"}.get(kind, "TIFF"))
    file.seek(0)
    return read_image(file)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm", "plain pgm"])
def test_16_bit_files_are_divided_by_257_and_rounded(kind: str) -> None:
    image = as_file(ALL_GRAYS, kind)
    assert is_16_bit(image)
    found = np.asarray(in_8_bits(image))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, DIVIDED)
    np.testing.assert_array_equal(found.ravel()[::257], np.arange(256))


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2")])
def test_16_bit_images_of_either_byte_order_are_read(mode: str, dtype: str) -> None:
    image = Image.frombytes(mode, (256, 256), ALL_GRAYS.astype(dtype).tobytes())
    np.testing.assert_array_equal(in_8_bits(image), DIVIDED)


@pytest.mark.parametrize("kind", ["png", "big-endian tiff", "pgm"])
def test_full_scale_is_white_and_so_is_what_is_above_it(kind: str) -> None:
    found = np.asarray(in_8_bits(as_file(ALL_GRAYS, kind), 4095))
    np.testing.assert_array_equal(found, np.floor(np.minimum(ALL_GRAYS, 4095) * (255 / 4095) + 0.5))
    assert found.ravel()[[0, 2048, 4095, 65535]].tolist() == [0, 128, 255, 255]


def test_a_pgm_file_that_states_its_maximum_is_scaled_by_it() -> None:
    values = np.array([[0, 2048, 4095]], dtype=">u2")
    image = read_image(BytesIO(b"P5 3 1 4095\n" + values.tobytes()))
    assert np.asarray(in_8_bits(image)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_need_the_value_that_is_white(dtype: type) -> None:
    image = Image.fromarray(np.array([[-5, 0, 51, 100, 1000]], dtype=dtype))
    with pytest.raises(ValueError, match=r"pixels of mode '[IF]' have no known range; .* \(--full-scale\)"):
        in_8_bits(image)
    assert np.asarray(in_8_bits(image, 100)).tolist() == [[0, 0, 130, 255, 255]]


def test_floating_point_pixels_may_be_infinite_but_not_nan() -> None:
    values = np.array([[0.25, np.inf, -np.inf]], dtype=np.float32)
    assert np.asarray(in_8_bits(Image.fromarray(values), 1)).tolist() == [[64, 255, 0]]
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        in_8_bits(Image.fromarray(values), 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
def test_images_of_8_bits_stay_as_they_are_whatever_the_full_scale(mode: str) -> None:
    image = Image.new(mode, (3, 3))
    assert in_8_bits(image) is image
    assert in_8_bits(image, 4095) is image


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "4095"])
def test_full_scale_is_a_finite_number_above_0(value: Any) -> None:
    with pytest.raises(SpecError, match="--full-scale must be a finite number above 0, but is "):
        in_8_bits(Image.new("L", (1, 1)), value)


def test_palettes_with_transparency_keep_their_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    palette = Image.fromarray(pixels).convert("P")
    colours = palette.convert("RGB")
    palette.info["transparency"] = b"\0\x80" * 20
    np.testing.assert_array_equal(as_mode(palette, "RGB"), colours)


def test_an_image_that_comes_from_no_source_is_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.uint16))
    assert np.asarray(as_mode(image, "RGB")).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
