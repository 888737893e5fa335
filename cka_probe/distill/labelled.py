"""A data spec -> labelled images, for training and held out; decoded once and held in memory where they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.errors import DataError, SpecError
from cka_probe.image_files import (
    FINGERPRINTED,
    READ_ERRORS,
    SUFFIXES,
    files_fingerprint,
    image_paths,
    in_8_bits,
    pixels_fingerprint,
    read_image,
    subfolders,
    unreadable,
)
from cka_probe.sources import DATASET_PREFIXES, SPLITS, digits

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

HELD_OUT = 10
"""Without a validation part, one image in so many is held out, by its place in a shuffled order."""


class LabelledImages(Protocol):
    """Images with their classes, by number. ``in_memory`` says that reading one costs next to nothing."""

    @property
    def name(self) -> str: ...

    @property
    def in_memory(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...


@dataclass(frozen=True)
class Splits:
    """The two parts of a data set.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        classes: names, in the order of the labels.
    """

    train: LabelledImages
    held_out: LabelledImages
    classes: tuple[str, ...]


def open_splits(
    spec: str, *, data_dir: str | None, download: bool, memory: float, held_out_only: bool = False
) -> Splits:
    """The training and held-out images that a data spec names.

    Args:
        spec: ``"digits"``, a folder of class folders (with ``train`` and ``val``, or a tenth of it is held out), or
            ``"torch/cifar100"``, ``"hfds/..."`` as timm's ``create_dataset`` knows them.
        data_dir: where a data set with a ``/`` prefix lies.
        download: fetch it where it can be.
        memory: gibibytes of decoded images that may be held; a part that fits is decoded at once.
        held_out_only: leave the training part undecoded.

    Raises:
        SpecError: the spec names nothing that has labels and can be read in any order.
        DataError: images or class folders are missing.
    """
    text = os.path.expanduser(spec)
    if text == "digits":
        splits = _digits()
    elif text.startswith(DATASET_PREFIXES):
        splits = _timm(text, data_dir, download)
    elif os.path.isdir(text):
        splits = _folders(Path(text))
    else:
        raise SpecError(
            f"The data must be 'digits', a folder of class folders, or a data set such as torch/cifar100, but "
            f"{spec!r} is none of these."
        )
    if len(splits.classes) < 2:
        raise DataError(f"{splits.train.name} must hold at least 2 classes, but holds {len(splits.classes)}.")
    held_out = _in_memory(splits.held_out, memory)
    return Splits(splits.train if held_out_only else _in_memory(splits.train, memory), held_out, splits.classes)


@dataclass(frozen=True)
class _Listed:
    """Images and labels that lie in lists."""

    name: str
    images: Sequence[Image]
    labels: Sequence[int]
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class _Files:
    """Image files below a folder."""

    name: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        path = self.paths[index]
        try:
            return in_8_bits(read_image(path)), self.labels[index]
        except READ_ERRORS as error:
            raise DataError(unreadable(str(path), error)) from error


@dataclass(frozen=True)
class _Dataset:
    """A data set of timm's."""

    name: str
    dataset: Any
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        try:
            image, label = self.dataset[index]
            return in_8_bits(image), int(label)
        except READ_ERRORS as error:
            raise DataError(unreadable(f"{self.name}/{index}", error)) from error


@dataclass(frozen=True)
class _Part:
    """Some of the images of another."""

    name: str
    whole: LabelledImages
    indices: NDArray[np.int64]
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.whole[int(self.indices[index])]


class _Decoded:
    """Decoded images in one array of bytes: worker processes share it, and forking copies none of it."""

    in_memory = True

    def __init__(self, source: LabelledImages) -> None:
        self.name = source.name
        self.fingerprint = fingerprint(source)
        buffer, labels, shapes = BytesIO(), [], []
        for index in range(len(source)):
            image, label = source[index]
            pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            buffer.write(pixels.tobytes())
            shapes.append((*pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1))
            labels.append(label)
        self._bytes = np.frombuffer(buffer.getbuffer(), dtype=np.uint8)
        self._shapes = np.array(shapes)
        self._ends = self._shapes.prod(1).cumsum()
        self._labels = np.array(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        from PIL.Image import fromarray

        rows, columns, channels = self._shapes[index]
        end = self._ends[index]
        shape = (rows, columns, channels) if channels > 1 else (rows, columns)
        pixels = self._bytes[end - rows * columns * channels : end].reshape(shape)
        return fromarray(pixels), int(self._labels[index])


def fingerprint(images: LabelledImages) -> str:
    """A hash, 16 hexadecimal digits, by which labelled images are known again; the same whether they are in memory.

    Of files it takes names, labels and sizes, and the bytes of a hundred spread over all; of other images the pixels
    of a hundred, and their labels. No time of a file is part of it.
    """
    if isinstance(images, _Decoded):
        return images.fingerprint
    indices = np.arange(len(images))
    whole = images
    while isinstance(whole, _Part):
        indices, whole = whole.indices[indices], whole.whole
    spread = np.unique(np.linspace(0, len(indices) - 1, FINGERPRINTED, dtype=np.int64)).tolist() if len(indices) else []
    if isinstance(whole, _Files):
        files = ((f"{whole.labels[i]} {str(whole.paths[i])[len(whole.name) :]}", whole.paths[i]) for i in indices)
        return files_fingerprint(files, frozenset(spread))
    chosen = [images[position] for position in spread]
    labels = torch.tensor([label for _, label in chosen])
    return pixels_fingerprint([*(image for image, _ in chosen), labels])


def _in_memory(source: LabelledImages, gibibytes: float) -> LabelledImages:
    """The images decoded, where all of them would fit; judged by a few spread over them."""
    if source.in_memory or not len(source):
        return source
    shown = [source[int(index)][0].size for index in np.linspace(0, len(source) - 1, 8)]
    size = len(source) * 3 * float(np.mean([width * height for width, height in shown]))
    if size > gibibytes * 2**30:
        return source
    logger.info("Decoding %d images of %s into memory (%.0f MiB).", len(source), source.name, size / 2**20)
    return _Decoded(source)


def _digits() -> Splits:
    train, held_out = (_Listed(f"digits/{split}", *digits(split)) for split in ("train", "validation"))
    return Splits(train, held_out, tuple(map(str, range(10))))


def _folders(root: Path) -> Splits:
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None) for split, names in SPLITS.items()
    }
    train, held_out = found["train"], found["validation"]
    if train is None and held_out is None:
        return _held_out_from(_files(root, _classes(root)), _classes(root))
    if train is None:
        raise DataError(
            f"{root} must hold the training images in a folder {' or '.join(SPLITS['train'])}, but has none."
        )
    classes = _classes(train)
    if held_out is None:
        return _held_out_from(_files(train, classes), classes)
    if _classes(held_out) != classes:
        odd = sorted(set(classes) ^ set(_classes(held_out)))
        raise DataError(
            f"{train} and {held_out} must hold the same class folders, but {len(odd)} are in one alone: "
            f"{', '.join(odd[:5])}. Add the missing ones, empty where a class has no image."
        )
    return Splits(_files(train, classes), _files(held_out, classes), classes)


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(path.name for path in subfolders(root) if not path.name.startswith(".")))
    if not classes:
        raise DataError(f"{root} must hold a folder of images for each class, but holds no folder.")
    return classes


def _files(root: Path, classes: tuple[str, ...]) -> _Files:
    numbers = {name: label for label, name in enumerate(classes)}
    paths = sorted(root / path for path in image_paths(root, classes))
    labels = [numbers[path.relative_to(root).parts[0]] for path in paths]
    if not paths:
        raise DataError(f"{root} must hold images ({', '.join(SUFFIXES)}) in its class folders, but none of them does.")
    return _Files(str(root), tuple(paths), tuple(labels))


def _held_out_from(whole: LabelledImages, classes: tuple[str, ...]) -> Splits:
    logger.info("%s has no validation part: one image in %d is held out.", whole.name, HELD_OUT)
    order = np.random.default_rng(0).permutation(len(whole))
    parts = order[len(whole) // HELD_OUT :], order[: len(whole) // HELD_OUT]
    train, held_out = (
        _Part(f"{whole.name} ({what})", whole, np.sort(part))
        for what, part in zip(("train", "held out"), parts, strict=True)
    )
    return Splits(train, held_out, classes)


def _timm(spec: str, data_dir: str | None, download: bool) -> Splits:
    from timm.data import create_dataset
    from torch.utils.data import IterableDataset

    if spec.startswith("torch/") and not data_dir:
        raise SpecError(f"The data set {spec} needs the folder it lies in, or is to be fetched into: --data-dir DIR.")
    parts = []
    for split in ("train", "validation"):
        try:
            dataset = create_dataset(spec, root=data_dir, split=split, download=download, is_training=split == "train")
        except (RuntimeError, OSError, ValueError, AssertionError, ImportError, TypeError, LookupError) as error:
            hint = "" if download else " It can be fetched with --download, where its source allows."
            raise DataError(
                f"The data set {spec} (split {split!r}, folder {data_dir}) could not be opened: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error
        if isinstance(dataset, IterableDataset):
            raise SpecError(f"Training reads images in an order of its own, but {spec} can only be read in its own.")
        parts.append(_Dataset(f"{spec}/{split}", dataset))
    names = getattr(parts[0].dataset, "classes", None) or _names_from_labels(parts[0])
    return Splits(parts[0], parts[1], tuple(map(str, names)))


def _names_from_labels(part: _Dataset) -> list[int]:
    """Numbers for names, where a data set has none: as many as its labels reach."""
    reader = getattr(part.dataset, "reader", None)
    targets = getattr(part.dataset, "targets", None)
    if targets is None and reader is not None and hasattr(reader, "dataset"):
        targets = reader.dataset[reader.label_key]  # hfds/
    labels = targets if targets is not None else [part[index][1] for index in range(len(part))]
    return list(range(int(max(labels)) + 1))
