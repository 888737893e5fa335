"""Image files: found below a folder, and opened."""

from __future__ import annotations

import heapq
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cka_probe.errors import DataError
from cka_probe.runtime.files import reason, require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

READ_ERRORS = (Exception,)
"""What reading an image may raise: decoders stumble over broken files in any way, and a user's data set is code."""


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
            "%d files below %s are skipped, since they are named pipes, sockets or devices, such as %s.",
            len(odd), root, min(odd),
        )  # fmt: skip
    return sorted(found)


def subfolders(root: Path) -> list[Path]:
    """The folders directly inside a folder, except links to itself or to one above it.

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
                f"it has more than {most:,} pixels, Pillow's limit against decompression bombs. Make it smaller, "
                "or remove it."
            ) from error
    return image


def unreadable(what: str, error: BaseException) -> str:
    """The message of an image that cannot be read.

    Args:
        what: names it.
        error: that was raised.
    """
    why = reason(error).rstrip(".")
    return f"{what} must be an image, but could not be read: {why}. Repair it, remove it, or use --skip-broken."


@contextmanager
def naming_unreadable(place: str) -> Iterator[None]:
    """Within the block, whatever is raised becomes a DataError that names the image.

    Args:
        place: what messages call the image.
    """
    try:
        yield
    except READ_ERRORS as error:
        raise DataError(unreadable(place, error)) from error


def _names_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as of a link to itself
        return False


def _is_odd(entry: os.DirEntry[str]) -> bool:
    """Whether it is there, but no regular file. Of a broken link, reading the image will show it."""
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
