"""Image files: found below a folder, opened, and known again by their pixels."""

from __future__ import annotations

import hashlib
import heapq
import logging
import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cka_probe.errors import DataError
from cka_probe.files import reason, require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

READ_ERRORS = (Exception,)
"""What reading an image may raise: decoders stumble over broken files in any way, and a user's data set is code."""

FINGERPRINTED = 100
"""Of so many images the bytes are part of a fingerprint; of the others the sizes are."""


def image_paths(root: Path, folders: Collection[str] | None = None) -> list[str]:
    """The image files below a folder, relative to it, sorted. Links are followed, but each real folder is read once.

    A folder that can be reached by several paths keeps the one without a link. A link to a folder above ``root`` is
    not followed. Named pipes, sockets and devices with the name of an image are reported and left out.

    Args:
        root: the folder.
        folders: names of folders directly inside, to read these alone; everything where None.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[str] = []
    odd: list[str] = []
    try:
        seen = {_identity(above) for above in root.resolve().parents}
    except OSError as error:
        raise _unreadable_folder(root, error) from error
    real, links = [""], list[str]()
    while real or links:
        inside = real.pop() if real else heapq.heappop(links)
        folder = os.path.join(root, inside) if inside else str(root)
        try:
            identity = _identity(folder)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = os.path.join(inside, entry.name)
                    if _is_folder(entry):
                        if inside or folders is None or entry.name in folders:
                            heapq.heappush(links, path) if entry.is_symlink() else real.append(path)
                    elif _names_image(entry.name) and (inside or folders is None):
                        (odd if _is_odd(entry) else found).append(path)
        except OSError as error:
            raise _unreadable_folder(folder, error) from error
    if odd:
        logger.warning(
            "%d of the files below %s are left out, as they are named pipes, sockets or devices and no images, such as "
            "%s.", len(odd), root, min(odd),
        )  # fmt: skip
    return sorted(found)


def subfolders(root: Path) -> list[Path]:
    """The folders directly inside a folder, but for links to itself or to one above it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        above = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
        return [path for path in root.iterdir() if path.is_dir() and _identity(path) not in above]
    except OSError as error:
        raise _unreadable_folder(root, error) from error


def read_image(file: str | Path | IO[bytes]) -> Image:
    """A file, or what was read of one, as a decoded image.

    Raises:
        DataError: it has more pixels than Pillow opens.
        Exception: whatever a decoder raises of a broken file: see `READ_ERRORS`.
    """
    import PIL.Image

    if isinstance(file, (str, Path)):
        require_regular(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of an image that is large, but not too large
        try:
            with PIL.Image.open(file) as opened:
                image: Image = opened
                image.load()
        except PIL.Image.DecompressionBombError as error:
            most = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
            raise DataError(
                f"it has more than {most:,} pixels, as files made to exhaust the memory have. Make the image smaller, "
                "or remove it."
            ) from error
    return image


def in_8_bits(image: Image) -> Image:
    """The image with 8 bits a channel, as it is where it has them; of a palette with transparency as RGBA.

    Raises:
        ValueError: its pixels have no known range.
    """
    from PIL.Image import fromarray

    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 65,536 grays at 255
        return fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no known range; save the image with 8 or 16 bits")
    if isinstance(image.info.get("transparency"), bytes) and image.mode == "P":
        return image.convert("RGBA")  # Pillow warns of other conversions, which give the same colours
    return image


def unreadable(what: str, error: BaseException) -> str:
    """The message of an image that cannot be read.

    Args:
        what: names it.
        error: that was raised.
    """
    return f"{what} must be an image, but could not be read: {reason(error)}"


def image_digest(images: Iterable[Image | Tensor]) -> int:
    """A hash of 64 bits of the pixels of one image, or of the two of a pair."""
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        _add_pixels(digest, image)
    return int.from_bytes(digest.digest(), "little", signed=True)


def files_fingerprint(paths: Iterable[tuple[str, str | Path]], bytes_of: Collection[int]) -> str:
    """A hash, 16 hexadecimal digits, of names and sizes of files, and of the bytes of some; never of their times.

    Args:
        paths: name and path of each.
        bytes_of: positions of those whose bytes count too.
    """
    digest = hashlib.sha256()
    for position, (name, path) in enumerate(paths):
        try:
            size = os.stat(path).st_size
            require_regular(path)
            content = Path(path).read_bytes() if position in bytes_of else b""
        except OSError as error:  # reading the image will tell
            size, content = -1, type(error).__name__.encode()
        digest.update(f"{name!a} {size}\n".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def pixels_fingerprint(images: Iterable[Image | Tensor | None]) -> str:
    """A hash, 16 hexadecimal digits, of the pixels of images; None for one that cannot be read."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(b"\n")
        if image is not None:
            _add_pixels(digest, image)
    return digest.hexdigest()[:16]


def _add_pixels(digest: Any, image: Image | Tensor) -> None:
    if isinstance(image, Tensor):
        digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
        digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return
    palette = image.palette.tobytes() if image.palette is not None else b""
    digest.update(f"{image.mode} {image.size}".encode() + palette)
    digest.update(image.tobytes())


def _names_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as of a link to itself
        return False


def _is_odd(entry: os.DirEntry[str]) -> bool:
    """Whether it is there, but no regular file. Of a broken link, reading the image will tell."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


def _identity(folder: str | Path) -> tuple[int, int] | str:
    """By which a folder is known under all its paths."""
    found = os.stat(folder)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)  # some file systems number none


def _unreadable_folder(folder: str | Path, error: OSError) -> DataError:
    return DataError(
        f"The folder {folder} cannot be read ({error.strerror or error}). Give the right to read it, or take it out of "
        "the data."
    )
