"""A data spec -> labelled images, for training and held out; decoded once and held in memory where they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cka_probe.errors import DataError, SpecError
from cka_probe.images.bit_depth import FULL_SCALE
from cka_probe.images.broken import BrokenImage, Search, with_substitutes, without
from cka_probe.images.datasets import DATASET_PREFIXES, DatasetImages, class_names, open_dataset
from cka_probe.images.decoded import Decoded, decoded_bytes
from cka_probe.images.digits import Digits
from cka_probe.images.fingerprints import FINGERPRINTED, files_fingerprint, pixels_fingerprint
from cka_probe.images.folder import SPLITS, Folder, class_folders
from cka_probe.images.sources import ImageSource, folder_path, read_labelled
from cka_probe.images.subset import Subset, origin

logger = logging.getLogger(__name__)

HELD_OUT = 10
"""Without a validation part, one image in so many is held out, by its place in a shuffled order."""


@dataclass(frozen=True)
class Parts:
    """The two parts of a data set, each image with its label.

    Attributes:
        train: to learn from.
        held_out: to measure on.
        classes: names, in the order of the labels.
        broken: images that cannot be read: replaced by the next one in training, left out elsewhere.
    """

    train: ImageSource
    held_out: ImageSource
    classes: tuple[str, ...]
    broken: tuple[BrokenImage, ...] = ()


def open_parts(  # noqa: PLR0913  # keyword-only
    spec: str | Path,
    *,
    data_dir: str | None = None,
    download: bool = False,
    full_scale: float | None = None,
    memory: float = 0,
    skip_broken: Search | None = None,
) -> Parts:
    """The training and held-out images that a data spec names.

    Args:
        spec: ``"digits"``; a folder of class folders, with ``train`` and ``val``, or a tenth of it is held out;
            ``"folder:PATH"`` for a folder of any name; or ``"torch/cifar100"``, ``"hfds/..."`` as timm's
            ``create_dataset`` knows them.
        data_dir: where a data set with a ``/`` prefix lies.
        download: fetch it where it can be.
        full_scale: as for `cka_probe.images.sources.open_source`.
        memory: gibibytes of decoded images that may be held; a part that fits is decoded at once.
        skip_broken: finds the images that cannot be read. In training the next readable image, with its own label,
            takes the place of each; the other parts do without. Where None, they stay, and are errors when they are
            read.

    Raises:
        SpecError: the spec names nothing that has labels and can be read in any order, or full_scale is no finite
            number above 0.
        DataError: images or class folders are missing, or an image cannot be read.
    """
    FULL_SCALE.check("--full-scale", full_scale)
    prefix, text = folder_path(str(spec))
    if text == "digits" and not prefix:
        parts = _digits()
    elif text.startswith(DATASET_PREFIXES) and not prefix:
        parts = _of_dataset(text, data_dir=data_dir, download=download, full_scale=full_scale)
    elif os.path.isdir(text):
        parts = _of_folder(Path(text), full_scale)
    else:
        raise SpecError(
            f"The data must be 'digits', a folder of class folders, or a data set such as torch/cifar100, but "
            f"{str(spec)!r} is none of these."
        )
    if len(parts.classes) < 2:
        raise DataError(f"{parts.train.name} must hold at least 2 classes, but holds {len(parts.classes)}.")
    if skip_broken is not None:
        parts = _of_readable(parts, skip_broken)
    held_out = _in_memory(parts.held_out, memory)
    return replace(parts, train=_in_memory(parts.train, memory), held_out=held_out)


def fingerprint(images: ImageSource) -> str:
    """A hash, 16 hexadecimal digits, by which labelled images are known again; the same whether they are in memory.

    Of files it takes names, labels and sizes, and the bytes of a hundred spread over all; of other images the pixels
    of a hundred, and their labels. No time of a file is part of it.

    Raises:
        DataError: an image that is no file cannot be read, or has no label.
    """
    if isinstance(images, Decoded):
        return images.fingerprint
    count = len(images)
    spread = np.unique(np.linspace(0, count - 1, FINGERPRINTED, dtype=np.int64)).tolist() if count else []
    whole, indices = origin(images, np.arange(count))
    if isinstance(whole, Folder):
        files = ((f"{whole.label(i)} /{whole.identity(i)}", whole.file(i)) for i in indices.tolist())
        return files_fingerprint(files, frozenset(spread))
    chosen = [read_labelled(images, position) for position in spread]
    labels = torch.tensor([label for _, label in chosen])
    return pixels_fingerprint([*(image for image, _ in chosen), labels])


def _of_readable(parts: Parts, search: Search) -> Parts:
    """The parts without the images that cannot be read, and these."""
    train, held_out = (search([part], np.arange(len(part))) for part in (parts.train, parts.held_out))
    return replace(
        parts,
        train=with_substitutes(parts.train, train),
        held_out=without(parts.held_out, held_out),
        broken=(*train, *held_out),
    )


def _in_memory(source: ImageSource, gibibytes: float) -> ImageSource:
    """The images decoded, where all of them would fit."""
    if source.in_memory or not len(source):
        return source
    size = decoded_bytes(source)
    if size > gibibytes * 2**30:
        return source
    logger.info("Decoding %d images of %s into memory (%.0f MiB).", len(source), source.name, size / 2**20)
    return Decoded(source, fingerprint(source))


def _digits() -> Parts:
    train, held_out = (Digits(split, name=f"digits/{split}") for split in ("train", "validation"))
    return Parts(train, held_out, train.classes)


def _of_folder(root: Path, full_scale: float | None) -> Parts:
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None) for split, names in SPLITS.items()
    }
    train, held_out = found["train"], found["validation"]
    if train is None and held_out is not None:
        raise DataError(
            f"{root} must hold the training images in a folder {' or '.join(SPLITS['train'])}, but has none."
        )
    whole = train or root
    classes = class_folders(whole)
    if held_out is None:
        return _held_out_from(Folder(whole, classes, full_scale=full_scale), classes)
    if class_folders(held_out) != classes:
        odd = sorted(set(classes) ^ set(class_folders(held_out)))
        raise DataError(
            f"{whole} and {held_out} must hold the same class folders, but {len(odd)} are in one alone: "
            f"{', '.join(odd[:5])}. Add the missing ones, empty where a class has no image."
        )
    folders = [Folder(part, classes, full_scale=full_scale) for part in (whole, held_out)]
    return Parts(folders[0], folders[1], classes)


def _held_out_from(whole: ImageSource, classes: Sequence[str]) -> Parts:
    logger.info("%s has no validation part: one image in %d is held out.", whole.name, HELD_OUT)
    order = np.random.default_rng(0).permutation(len(whole))
    count = len(whole) // HELD_OUT
    train = Subset(whole, np.sort(order[count:]), f"{whole.name} (train)")
    held_out = Subset(whole, np.sort(order[:count]), f"{whole.name} (held out)")
    return Parts(train, held_out, tuple(classes))


def _of_dataset(spec: str, *, data_dir: str | None, download: bool, full_scale: float | None) -> Parts:
    parts = []
    for split in ("train", "validation"):
        images = open_dataset(spec, split, data_dir=data_dir, download=download, full_scale=full_scale)
        if not isinstance(images, DatasetImages):
            raise SpecError(f"Training reads images in an order of its own, but {spec} can only be read in its own.")
        parts.append(images)
    return Parts(parts[0], parts[1], class_names(parts[0]))
