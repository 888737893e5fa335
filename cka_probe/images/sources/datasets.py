"""Datasets that are read by number: a user's own, and those that timm's ``create_dataset`` knows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import IterableDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.images.sources.bit_depth import as_mode, in_8_bits
from cka_probe.images.sources.files import naming_unreadable, read_image
from cka_probe.images.sources.streams import Shards, Stream, as_image

if TYPE_CHECKING:
    from PIL.Image import Image

DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

_PACKAGES = {
    "hfds/": ("datasets", "datasets"),
    "hfids/": ("datasets", "datasets"),
    "tfds/": ("tensorflow_datasets", "tensorflow-datasets"),
    "wds/": ("webdataset", "cka-probe[shards]"),
}
"""What reads such data sets: the module, and what pip installs it by."""


class DatasetImages:
    """A dataset of images, or of tuples that start with an image; a whole number behind it is its label.

    Args:
        dataset: with a length.
        name: of the data.
        item: reads one of its items by number; the dataset's own access by default.
        mode: of Pillow, to convert images to; left as they are where empty.
        full_scale: as for `cka_probe.images.sources.bit_depth.in_8_bits`.

    Attributes:
        dataset: as given.
        classes: the dataset's own, if it has them.
    """

    in_memory = False

    def __init__(
        self,
        dataset: Any,
        name: str,
        *,
        item: Callable[[int], Any] | None = None,
        mode: str = "",
        full_scale: float | None = None,
    ) -> None:
        self.dataset = dataset
        self.name = name
        self.full_scale = full_scale
        self.classes = _class_names(dataset)
        self._item = item
        self._mode = mode

    def __len__(self) -> int:
        return len(self.dataset)

    def original(self, index: int) -> Image | Tensor:
        """An image as it is stored, whatever its depth."""
        return as_image(self._read(index), self.identity(index))

    def read(self, index: int) -> tuple[Image | Tensor, int | None]:
        """An image in 8 bits or a tensor, and its label, or None.

        Raises:
            DataError: the image cannot be read; the message names it.
        """
        with naming_unreadable(self.place(index)):
            item = self._read(index)
            image = as_image(item, self.identity(index))
            if not isinstance(image, Tensor):
                image.load()  # a dataset may leave it to the one who looks at the pixels
                image = in_8_bits(image, self.full_scale)
                image = as_mode(image, self._mode) if self._mode else image
            return image, _label(item)

    def identity(self, index: int) -> str:
        """The number of an image."""
        return f"{self.name}/{index}"

    def place(self, index: int) -> str:
        """What messages call an image: its number, and its file where the data set lists its files."""
        files = getattr(self.dataset, "samples", None)  # of torchvision's data sets of files: path and label
        file = files[index][0] if isinstance(files, list) and len(files) == len(self) else None
        return f"{self.identity(index)} ({file})" if isinstance(file, str) else self.identity(index)

    def _read(self, index: int) -> Any:
        return self.dataset[index] if self._item is None else self._item(index)


def open_dataset(
    spec: str,
    split: str,
    *,
    data_dir: str | None = None,
    download: bool = False,
    full_scale: float | None = None,
) -> DatasetImages | Stream:
    """A part of a data set that timm knows.

    timm's own access converts images to RGB before anyone sees their depth, which clips 16 bits to white, and puts the
    next image in place of a broken one. So images are read through its readers, and converted here.

    Args:
        spec: ``"torch/cifar100"``, ``"hfds/..."``, ``"wds/..."``.
        split: the data set's name of the part, or one that timm translates.
        data_dir: where it lies.
        download: fetch it where it can be.
        full_scale: as for `cka_probe.images.sources.bit_depth.in_8_bits`.

    Raises:
        SpecError: it needs ``data_dir``.
        DataError: it cannot be opened.
    """
    from timm.data import ImageDataset, create_dataset

    if spec.startswith("torch/") and not data_dir:
        raise SpecError(f"Give the folder of the data set {spec}, or the one to download it to: --data-dir DIR.")
    try:
        dataset = create_dataset(spec, root=data_dir, split=split, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, TypeError, LookupError) as error:
        module, package = _PACKAGES.get(f"{spec.partition('/')[0]}/", ("", ""))
        if module and isinstance(error, (ImportError, RuntimeError)) and find_spec(module) is None:
            raise DataError(f"{spec} needs the package {module}: pip install '{package}'.") from error
        hint = "" if download else "It can be fetched with --download, where its source allows."
        raise DataError(
            f"The data set {spec} (split {split!r}, folder {data_dir}) could not be opened: "
            f"{type(error).__name__}: {str(error).rstrip('.')}. {hint}".rstrip()
        ) from error
    name = f"{spec}/{split}"
    if isinstance(dataset, IterableDataset):
        if spec.startswith("wds/"):
            return Shards(dataset, name, full_scale=full_scale)
        return Stream(dataset, name, mode=_unconverted(dataset, spec), full_scale=full_scale)
    if isinstance(dataset, ImageDataset):
        return DatasetImages(dataset, name, item=partial(_through_reader, dataset.reader), full_scale=full_scale)
    if hasattr(dataset, "loader"):  # of torchvision's data sets of files: it converts to RGB
        dataset.loader = read_image
        return DatasetImages(dataset, name, mode="RGB", full_scale=full_scale)
    return DatasetImages(dataset, name, full_scale=full_scale)


def of_user(dataset: Any, full_scale: float | None = None) -> DatasetImages:
    """A user's own dataset as an image source. Of timm's, a broken image is named: its own access takes the next.

    Args:
        dataset: with a length.
        full_scale: as for `cka_probe.images.sources.bit_depth.in_8_bits`.
    """
    from timm.data import ImageDataset

    name = type(dataset).__name__
    if isinstance(dataset, ImageDataset) and not dataset.load_bytes:
        return DatasetImages(dataset, name, item=partial(_as_timm, dataset), full_scale=full_scale)
    return DatasetImages(dataset, name, full_scale=full_scale)


def class_names(images: DatasetImages) -> tuple[str, ...]:
    """The names of the classes; where a data set has none, as many numbers as its labels reach.

    Raises:
        DataError: an image has no label.
    """
    if images.classes is not None:
        return images.classes
    labels: Iterable[Any] | None = dataset_labels(images)
    if labels is None:
        labels = []
        for index in range(len(images)):
            with suppress(DataError):  # who uses the image says what is wrong with it
                labels.append(images.read(index)[1])
    try:
        return tuple(map(str, range(int(max(labels)) + 1)))
    except (TypeError, ValueError) as error:
        raise DataError(f"Each image of {images.name} must have a class, a whole number, but not all have.") from error


def dataset_labels(images: DatasetImages) -> Sequence[Any] | None:
    """The labels of all images, where a data set has them without reading its images; else None."""
    reader = getattr(images.dataset, "reader", None)
    labels: Sequence[Any] | None = getattr(images.dataset, "targets", None)
    if labels is None and reader is not None and hasattr(reader, "dataset"):
        labels = reader.dataset[reader.label_key]  # hfds/
    return labels


def _through_reader(reader: Any, index: int) -> tuple[Image, Any]:
    import PIL.Image

    image, label, *_ = reader[index]
    if isinstance(image, PIL.Image.Image):
        return image, label
    with closing(image):  # the reader leaves it open
        return read_image(image), label


def _as_timm(dataset: Any, index: int) -> tuple[Any, Any]:
    """What timm's ImageDataset gives for a number, its transforms applied, but of that very image."""
    image, label = _through_reader(dataset.reader, index)
    if dataset.transform is not None:
        image = dataset.transform(as_mode(image, dataset.input_img_mode or "RGB"))
    return image, dataset.target_transform(label) if dataset.target_transform is not None else label


def _unconverted(dataset: Any, spec: str) -> str:
    """The mode that the images of a Hub stream are to have, once its reader leaves them as they are."""
    if not spec.startswith("hfids/") or not hasattr(dataset, "reader"):
        return ""
    mode: str = dataset.reader.input_img_mode or ""
    dataset.reader.input_img_mode = ""
    return mode


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def _label(item: Any) -> int | None:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return None
    try:
        return operator.index(item[1])
    except TypeError:
        return None
