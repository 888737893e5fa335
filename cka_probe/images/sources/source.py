"""A data spec -> a source: images that are read by number, each with an identity and, if it has one, a label."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.images.sources.bit_depth import FULL_SCALE
from cka_probe.images.sources.datasets import DATASET_PREFIXES, of_user, open_dataset
from cka_probe.images.sources.digits import Digits
from cka_probe.images.sources.folder import Folder, split_folder
from cka_probe.images.sources.streams import Stream

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class ImageSource(Protocol):
    """Images that are read by number, for probing, training and evaluation alike."""

    @property
    def name(self) -> str:
        """What the data are called in records and messages."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the labels, in their order; None where they are not known."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether reading an image costs next to nothing."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image | Tensor, int | None]:
        """An image and its label, or None where it has none.

        Returns:
            A PIL image with 8 bits a channel whatever its file has, or a (c, h, w) tensor as it is.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        ...

    def identity(self, index: int) -> str:
        """What an image is known by; different for different images of a source."""
        ...

    def place(self, index: int) -> str:
        """What messages call an image: the whole path of a file, else its identity."""
        ...


def open_source(
    spec: str | Path | Dataset[Any] | Tensor | ImageSource,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    full_scale: float | None = None,
) -> ImageSource:
    """The images that a data spec names.

    Args:
        spec: ``"digits"``; a folder of images, with or without class folders and ``train`` and ``val``;
            ``"folder:PATH"`` for a folder of any name; ``"torch/cifar100"``, ``"hfds/..."``, ``"wds/..."``,
            ``"tfds/..."`` as timm's ``create_dataset`` knows them; or, from Python, any dataset (or tensor, n first) of
            images or of tuples that start with one. A PIL image is preprocessed for each subject; a (c, h, w) tensor
            goes to every network as it is. A source that is open already is returned as it is.
        split: ``"train"`` or ``"validation"``, or a data set's own name for one. Without it: the validation part of
            a folder or data set that has one, and all of the digits.
        data_dir: where a data set lies, for specs with a ``/`` prefix.
        download: fetch the data set where it can be.
        full_scale: the pixel value that is white in files of more than 8 bits; 65535 by default. With it, images of 32
            bits and of floating-point values can be read too.

    Raises:
        SpecError: the spec names nothing, or full_scale is no finite number above 0.
        DataError: the data are missing, or hold no image.
    """
    FULL_SCALE.check("--full-scale", full_scale)
    if isinstance(spec, ImageSource):
        if full_scale is not None:
            raise SpecError(f"{spec.name} is open already. Give full_scale where it is opened.")
        return spec
    if not isinstance(spec, (str, Path)):
        if isinstance(spec, DataLoader):
            raise SpecError(
                "The data must be a dataset, which is read in batches here, but is a DataLoader. Give loader.dataset, "
                "and its batch size and workers as batch_size= and workers=."
            )
        if isinstance(spec, IterableDataset):
            return Stream(spec, type(spec).__name__, full_scale=full_scale)
        if not hasattr(spec, "__len__"):
            raise SpecError(f"A dataset must have a length, but {type(spec).__name__} has no __len__.")
        return of_user(spec, full_scale)
    prefix, text = folder_path(str(spec))
    if (data_dir or download) and not text.startswith(DATASET_PREFIXES):
        raise SpecError(
            f"--data-dir and --download are for data sets ({', '.join(DATASET_PREFIXES)}), but the data are {text!r}."
        )
    if text == "digits" and not prefix:
        return Digits(split)
    if text.startswith(DATASET_PREFIXES) and not prefix:
        return open_dataset(text, split or "validation", data_dir=data_dir, download=download, full_scale=full_scale)
    if not os.path.isdir(text):
        raise SpecError(
            f"The data must be 'digits', a folder of images, or a data set such as torch/cifar100 "
            f"(prefixes: {', '.join(DATASET_PREFIXES)}), but {text!r} is none of these."
        )
    return Folder(split_folder(Path(text), split), full_scale=full_scale)


def read_labelled(source: ImageSource, index: int) -> tuple[Image, int]:
    """An image of a source, and its label.

    Raises:
        DataError: the image cannot be read, is a tensor, or has no label.
    """
    image, label = source.read(index)
    if isinstance(image, Tensor):
        raise DataError(f"{source.place(index)} must be a PIL image to be augmented, but is a tensor.")
    if label is None:
        raise DataError(f"{source.place(index)} must have a class, a whole number, but has none.")
    return image, label


def folder_path(spec: str) -> tuple[bool, str]:
    """Whether ``folder:`` stands before a path, and the path."""
    return spec.startswith("folder:"), os.path.expanduser(spec.removeprefix("folder:"))
