"""A data spec -> a source: images that are read by number, each with an identity."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.image_files import SUFFIXES, image_paths, read_image, subfolders
from cka_probe.paths import Paths
from cka_probe.streams import Shards, Stream, as_image

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = {
    "validation": ("validation", "val", "valid", "test"),
    "train": ("train", "training"),
}
DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


class ImageSource(Protocol):
    """Images that can be read by number, each with an identity of its own."""

    name: str

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image | Tensor: ...

    def identity(self, index: int) -> str: ...


def open_source(
    spec: str | Path | Dataset[Any] | Tensor,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
) -> ImageSource:
    """The images that a data spec names.

    Args:
        spec: ``"digits"``; a folder of images, with or without class folders and ``train`` and ``val``;
            ``"folder:PATH"`` for a folder of any name; ``"torch/cifar100"``, ``"hfds/..."``, ``"wds/..."``,
            ``"tfds/..."`` as timm's ``create_dataset`` knows them; or, from Python, any dataset (or tensor, n first) of
            images or of tuples that start with one. A PIL image is preprocessed for each subject; a (c, h, w) tensor
            goes to every network as it is.
        split: ``"train"`` or ``"validation"``, or a data set's own name for one. Without it: the validation part of
            a folder or data set that has one, and all of the digits.
        data_dir: where a data set lies, for specs with a ``/`` prefix.
        download: fetch the data set where it can be.

    Raises:
        SpecError: the spec names nothing.
        DataError: the data are missing, or hold no image.
    """
    if not isinstance(spec, (str, Path)):
        if isinstance(spec, IterableDataset):
            return Stream(spec, type(spec).__name__)
        if not hasattr(spec, "__len__"):
            raise SpecError(f"A dataset must tell its length, but {type(spec).__name__} has no __len__.")
        return _Dataset(spec, type(spec).__name__)
    prefix, text = folder_path(str(spec))
    if (data_dir or download) and not text.startswith(DATASET_PREFIXES):
        raise SpecError(
            f"--data-dir and --download are for data sets ({', '.join(DATASET_PREFIXES)}), but the data are {text!r}."
        )
    if text == "digits" and not prefix:
        return Digits(split)
    if text.startswith(DATASET_PREFIXES) and not prefix:
        return _timm_dataset(text, split or "validation", data_dir, download)
    if not os.path.isdir(text):
        raise SpecError(
            f"The data must be 'digits', a folder of images, or a data set such as torch/cifar100 "
            f"(prefixes: {', '.join(DATASET_PREFIXES)}), but {text!r} is none of these."
        )
    return Folder(Path(text), split)


def folder_path(spec: str) -> tuple[bool, str]:
    """Whether ``folder:`` stands before a path, and the path."""
    return spec.startswith("folder:"), os.path.expanduser(spec.removeprefix("folder:"))


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
    name = "digits"

    def __init__(self, split: str | None) -> None:
        self._images, _ = digits(_canonical(split))
        self._split = _canonical(split) or "all"

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image:
        return self._images[index]

    def identity(self, index: int) -> str:
        return f"digits/{self._split}/{index}"


class Folder:
    """Images below a folder, in the order of their paths.

    Attributes:
        name: the folder, or that of its split.
        paths: of the images, relative to it.
    """

    def __init__(self, root: Path, split: str | None) -> None:
        self._root = _split_folder(root, split)
        self.name = str(self._root)
        self.paths = Paths(image_paths(self._root))
        if not self.paths:
            raise DataError(f"{self._root} must hold images ({', '.join(SUFFIXES)}), but no file below it is one.")

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The path of an image."""
        return self._root / self.paths[index]

    def image(self, index: int) -> Image:
        return read_image(self.file(index))

    def identity(self, index: int) -> str:
        return self.paths[index]


class _Dataset:
    """A dataset of images, or of tuples that start with one."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> Image | Tensor:
        return as_image(self._dataset[index], self.identity(index))

    def identity(self, index: int) -> str:
        return f"{self.name}/{index}"


class _TimmImages(_Dataset):
    """A data set of timm's, read through its reader: its own access puts the next image in place of a broken one."""

    def image(self, index: int) -> Image | Tensor:
        import PIL.Image

        item, _ = self._dataset.reader[index]
        if not isinstance(item, PIL.Image.Image):
            with closing(item):  # the reader leaves it open
                item = read_image(item)
        return as_image(item, self.identity(index))


def _canonical(split: str | None) -> str | None:
    """``"validation"`` and ``"train"`` for their other names; any other split as it is."""
    return next((name for name, names in SPLITS.items() if split in names), split)


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split below ``root``; ``root`` itself where it has none and none was asked for.

    Unasked, only where all folders below ``root`` are splits: "train" is the name of a class too.
    """
    wanted = (split,) if split else (*SPLITS["validation"], *SPLITS["train"])
    if not split and not {path.name for path in subfolders(root)} <= set(wanted):
        return root
    names = SPLITS.get(_canonical(split) or "", wanted) if split else wanted
    found = [root / name for name in names if (root / name).is_dir()]
    if split and not found:
        raise DataError(f"{root} must have a folder for the split {split!r} ({', '.join(names)}), but has none.")
    return found[0] if found else root


def _timm_dataset(spec: str, split: str, data_dir: str | None, download: bool) -> ImageSource:
    from timm.data import ImageDataset, create_dataset

    if spec.startswith("torch/") and not data_dir:
        raise SpecError(f"The data set {spec} needs the folder it lies in, or is to be fetched into: --data-dir DIR.")
    try:
        dataset = create_dataset(spec, root=data_dir, split=split, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, TypeError, LookupError) as error:
        if isinstance(error, ImportError):
            hint = "Install the package that reads such data sets."
        else:
            hint = "" if download else "It can be fetched with --download, where its source allows."
        raise DataError(
            f"The data set {spec} (split {split!r}, folder {data_dir}) could not be opened: "
            f"{type(error).__name__}: {str(error).rstrip('.')}. {hint}".rstrip()
        ) from error
    name = f"{spec}/{split}"
    if isinstance(dataset, IterableDataset):
        return (Shards if spec.startswith("wds/") else Stream)(dataset, name)
    return _TimmImages(dataset, name) if isinstance(dataset, ImageDataset) else _Dataset(dataset, name)
