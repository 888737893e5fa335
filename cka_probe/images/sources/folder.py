"""A folder of images, with or without a folder for each class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cka_probe.errors import DataError
from cka_probe.images.sources.bit_depth import in_8_bits
from cka_probe.images.sources.files import SUFFIXES, image_paths, naming_unreadable, read_image, subfolders
from cka_probe.images.sources.paths import Paths

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

TEST = "test"
"""The folder of test images: beside one of validation images, that which nothing is decided on."""

SPLITS = {
    "validation": ("validation", "val", "valid", TEST),
    "train": ("train", "training"),
}


class Folder:
    """Images below a folder.

    Args:
        root: the folder.
        classes: names of folders directly inside. Only images in these are read, each labelled with the position of
            its folder's name, in the order of folders. None reads all images below ``root``, without labels, in the
            order of their paths.
        label: of all images where ``classes`` is None.
        full_scale: as for `cka_probe.images.sources.bit_depth.in_8_bits`.

    Attributes:
        name: the folder.
        classes: as given.
        paths: of the images, relative to the folder.

    Raises:
        DataError: there is no image, or a folder cannot be read.
    """

    in_memory = False

    def __init__(
        self,
        root: Path,
        classes: Sequence[str] | None = None,
        *,
        label: int | None = None,
        full_scale: float | None = None,
    ) -> None:
        self._root, self._label = root, label
        self.name = str(root)
        self.full_scale = full_scale
        self.classes = tuple(classes) if classes is not None else None
        self._numbers = {name: number for number, name in enumerate(classes or ())}
        found = image_paths(root, classes)
        if classes is not None:
            found.sort(key=_by_parts)
        self.paths = Paths(found)
        if not self.paths:
            suffixes = ", ".join(SUFFIXES)
            if classes is not None:
                raise DataError(f"{root} must hold images ({suffixes}) in its class folders, but none of them does.")
            raise DataError(f"{root} must hold images ({suffixes}), but no file below it is one.")

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The path of an image."""
        return self._root / self.paths[index]

    def original(self, index: int) -> Image:
        """An image as it is stored, whatever its depth."""
        return read_image(self.file(index))

    def read(self, index: int) -> tuple[Image, int | None]:
        """An image in 8 bits, and its class, or None without class folders.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        with naming_unreadable(self.place(index)):
            return in_8_bits(self.original(index), self.full_scale), self.label(index)

    def label(self, index: int) -> int | None:
        """The class of an image; without class folders the one of all images, if there is one."""
        return self._numbers[self.paths[index].partition(os.sep)[0]] if self.classes is not None else self._label

    def identity(self, index: int) -> str:
        """The path of an image, relative to the folder."""
        return self.paths[index]

    def place(self, index: int) -> str:
        """The whole path of an image, for messages."""
        return os.path.join(self.name, self.paths[index])


def class_folders(root: Path) -> tuple[str, ...]:
    """The names of the folders directly inside a folder, sorted; hidden ones are left out.

    Raises:
        DataError: there is none.
    """
    classes = tuple(sorted(path.name for path in subfolders(root) if not path.name.startswith(".")))
    if not classes:
        raise DataError(f"{root} must hold a folder of images for each class, but holds no folder.")
    return classes


def has_class_folders(root: Path) -> bool:
    """Whether a folder holds two folders or more that are not hidden, and no image beside them."""
    inside = [path for path in root.iterdir() if not path.name.startswith(".")]
    folders = sum(path.is_dir() for path in inside)
    return folders > 1 and not any(path.suffix.lower() in SUFFIXES and path.is_file() for path in inside)


def canonical_split(split: str | None) -> str | None:
    """``"validation"`` and ``"train"`` for their other names; any other split as it is."""
    return next((name for name, names in SPLITS.items() if split in names), split)


def split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split below ``root``; ``root`` itself where it has none and none was asked for.

    Unasked, only where all folders below ``root`` are splits: "train" is the name of a class too.
    """
    names: Sequence[str] = (*SPLITS["validation"], *SPLITS["train"])
    if not split and not {path.name for path in subfolders(root)} <= set(names):
        return root
    if split:  # test images never stand in for validation images that were asked for, nor these for them
        own = SPLITS.get(canonical_split(split) or "", (split,))
        names = (TEST,) if split == TEST else [name for name in own if name != TEST]
    found = [root / name for name in names if (root / name).is_dir()]
    if split and not found:
        raise DataError(f"{root} must have a folder for the split {split!r} ({', '.join(names)}), but has none.")
    if found and not split:
        logger.info("Of %s, the part %s is used (--split).", root, found[0].name)
    return found[0] if found else root


def _by_parts(path: str) -> str:
    """Sorts paths folder by folder: "a/1.png" before "a b/1.png"."""
    return path.replace(os.sep, "\0")
