"""A data spec -> labelled images for training, validation and test; decoded once and held in memory where they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.errors import DataError, SpecError
from cka_probe.images.broken import BrokenImage, Search, readable_indices, with_substitutes, without
from cka_probe.images.fingerprints import FINGERPRINTED, files_fingerprint, pixels_fingerprint
from cka_probe.images.sources.bit_depth import FULL_SCALE
from cka_probe.images.sources.datasets import DATASET_PREFIXES, DatasetImages, class_names, dataset_labels, open_dataset
from cka_probe.images.sources.decoded import Decoded, decoded_bytes
from cka_probe.images.sources.digits import Digits
from cka_probe.images.sources.folder import SPLITS, TEST, Folder, class_folders, has_class_folders
from cka_probe.images.sources.source import ImageSource, folder_path, read_labelled
from cka_probe.images.sources.subset import Subset, origin

logger = logging.getLogger(__name__)

TEST_SHARE = 10
"""Without a test part, one image in so many is cut off for it, by its place in a shuffled order."""

FEW = 64
"""Validation images below which networks are compared on training images instead.

The shuffled control of n images, 0 on average, has a standard deviation of about √2/n: 0.02 here.
"""


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set, each image with its label.

    Attributes:
        train: to learn from.
        validation: to decide on; None where there is none, and nothing is decided.
        test: to report on, and to decide nothing.
        classes: names, in the order of the labels; none where the images have no labels, which then are all 0.
        broken: images that cannot be read: replaced by the next one in training, left out elsewhere.
        train_once: the training images without those that stand in for broken ones; None where there are none.
    """

    train: ImageSource
    validation: ImageSource | None
    test: ImageSource
    classes: tuple[str, ...]
    broken: tuple[BrokenImage, ...] = ()
    train_once: ImageSource | None = None

    @property
    def probed(self) -> ImageSource:
        """The images that networks are compared on: those of validation, or of training where these are few or none."""
        if self.validation is not None and len(self.validation) >= FEW:
            return self.validation
        return self.train if self.train_once is None else self.train_once

    @property
    def counts(self) -> dict[str, int]:
        """How many images each part has."""
        return {
            "train": len(self.train),
            "validation": len(self.validation) if self.validation is not None else 0,
            "test": len(self.test),
        }


def open_parts(  # noqa: PLR0913  # public, keyword-only
    spec: str | Path,
    *,
    validation: float = 0,
    seed: int = 0,
    data_dir: str | None = None,
    download: bool = False,
    full_scale: float | None = None,
    memory: float = 0,
    skip_broken: Search | None = None,
    labels: bool = True,
) -> Parts:
    """The training, validation and test images that a data spec names.

    Args:
        spec: ``"digits"``; a folder of class folders, with ``train`` and ``val`` or ``test`` (with all three, each is
            that part as it is), or a tenth of it becomes the test part; ``"folder:PATH"`` for a folder of any name; or
            ``"torch/cifar100"``, ``"hfds/..."`` as timm's ``create_dataset`` knows them, whose validation or test split
            is the test part.
        validation: share of the training images that becomes the validation part, of each class as far as its images
            can be divided; each class keeps one training image. 0 for none.
        seed: of this choice.
        data_dir: where a data set with a ``/`` prefix lies.
        download: fetch it where it can be.
        full_scale: as for `cka_probe.images.sources.source.open_source`.
        memory: gibibytes of decoded images that may be held; a part that fits is decoded at once.
        skip_broken: finds the images that cannot be read. In training the next readable image, with its own label,
            takes the place of each; the other parts do without. Where None, they stay, and are errors when they are
            read.
        labels: refuse images without labels; else a folder without class folders has training images alone.

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
        parts = _of_folder(Path(text), full_scale) if labels else _of_any_folder(Path(text), full_scale)
    else:
        raise SpecError(
            f"The data must be 'digits', a folder of class folders, or a data set such as torch/cifar100, but "
            f"{str(spec)!r} is none of these."
        )
    if labels and len(parts.classes) < 2:
        raise DataError(f"{parts.train.name} must hold at least 2 classes, but holds {len(parts.classes)}.")
    if parts.validation is not None:
        logger.info("%s has validation images of its own: --validation is not used.", text)
    elif validation and parts.classes:
        parts = _with_validation(parts, validation, seed)
    broken = () if skip_broken is None else _broken(parts, skip_broken)
    in_training, in_validation, in_test = broken or ((), (), ())
    train = _in_memory(with_substitutes(parts.train, in_training), memory)
    return Parts(
        train,
        _in_memory(without(parts.validation, in_validation), memory) if parts.validation is not None else None,
        _in_memory(without(parts.test, in_test), memory),
        parts.classes,
        (*in_training, *in_validation, *in_test),
        Subset(train, readable_indices(np.arange(len(train)), in_training), train.name) if in_training else None,
    )


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


def _broken(parts: Parts, search: Search) -> tuple[tuple[BrokenImage, ...], ...]:
    """The images of each part that cannot be read."""
    return tuple(
        search([part], np.arange(len(part))) if part is not None else ()
        for part in (parts.train, parts.validation, parts.test)
    )


def _in_memory(source: ImageSource, gibibytes: float) -> ImageSource:
    """The images decoded, where all of them would fit."""
    if source.in_memory or not len(source):
        return source
    size = decoded_bytes(source)
    if size > gibibytes * 2**30:
        return source
    logger.info("Decoding %d images of %s into memory (%.1f MiB).", len(source), source.name, size / 2**20)
    return Decoded(source, fingerprint(source))


def _digits() -> Parts:
    train, test = (Digits(split, name=f"digits/{split}") for split in ("train", "validation"))
    return Parts(train, None, test, train.classes)


def _of_any_folder(root: Path, full_scale: float | None) -> Parts:
    """As `_of_folder`; of a folder without class folders all images, or those of its training part, for training."""
    whole = next((root / name for name in SPLITS["train"] if (root / name).is_dir()), root)
    if has_class_folders(whole):
        return _of_folder(root, full_scale)
    images = Folder(whole, label=0, full_scale=full_scale)
    return Parts(images, None, Subset(images, np.arange(0), f"{images.name} (test)"), ())


def _of_folder(root: Path, full_scale: float | None) -> Parts:
    def first(names: Sequence[str]) -> Path | None:
        return next((root / name for name in names if (root / name).is_dir()), None)

    train, test = first(SPLITS["train"]), first((TEST,))
    validation = first([name for name in SPLITS["validation"] if name != TEST])
    if test is None:  # one part beside the training images is for the report
        validation, test = None, validation
    if train is None and test is not None:
        raise DataError(
            f"{root} must hold the training images in a folder {' or '.join(SPLITS['train'])}, but has none."
        )
    whole = train or root
    classes = class_folders(whole)
    for part in (validation, test):
        if part is not None and class_folders(part) != classes:
            odd = sorted(set(classes) ^ set(class_folders(part)))
            raise DataError(
                f"{whole} and {part} must hold the same class folders, but {len(odd)} are in only one: "
                f"{', '.join(odd[:5])}. Add the missing ones, empty where a class has no image."
            )
    images = Folder(whole, classes, full_scale=full_scale)
    if test is None:
        return _with_test(images, classes)
    decides = Folder(validation, classes, full_scale=full_scale) if validation is not None else None
    return Parts(images, decides, Folder(test, classes, full_scale=full_scale), classes)


def _with_test(whole: Folder, classes: tuple[str, ...]) -> Parts:
    """The images divided into those for training and a tenth for the test; each class keeps one for training."""
    logger.info("%s has no test part: one image in %d is used for testing.", whole.name, TEST_SHARE)
    labels = _labels(whole)
    order = np.random.default_rng(0).permutation(len(whole))
    _, firsts = np.unique(labels[order[::-1]], return_index=True)
    stays = np.zeros(len(whole), dtype=bool)
    stays[len(whole) - 1 - firsts] = True  # by its place in the order, the last image of each class
    count = len(whole) // TEST_SHARE
    taken = np.arange(len(whole)) < count
    if not count:  # of few images, one
        taken[np.flatnonzero(~stays)[:1]] = True
    taken &= ~stays
    train, test = np.sort(order[~taken]), np.sort(order[taken])
    return Parts(
        Subset(whole, train, f"{whole.name} (train)"), None, Subset(whole, test, f"{whole.name} (test)"), classes
    )


def _of_dataset(spec: str, *, data_dir: str | None, download: bool, full_scale: float | None) -> Parts:
    parts = []
    for split in ("train", "validation"):
        images = open_dataset(spec, split, data_dir=data_dir, download=download, full_scale=full_scale)
        if not isinstance(images, DatasetImages):
            raise SpecError(f"Training reads images in random order, but {spec} can only be read in sequence.")
        parts.append(images)
    return Parts(parts[0], None, parts[1], class_names(parts[0]))


def _with_validation(parts: Parts, share: float, seed: int) -> Parts:
    """The parts, with some of the training images for validation; without, where no class can spare one."""
    images = parts.train
    chosen = stratified(_labels(images), share, seed)
    if not len(chosen):
        logger.warning(
            "%s has one image per class, so none can be used for validation (--validation %g): no best epoch is "
            "chosen, and the weights of the last epoch are kept.", images.name, share,
        )  # fmt: skip
        return parts
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    name = images.name.removesuffix(" (train)")
    train, validation = Subset(images, rest, images.name), Subset(images, chosen, f"{name} (validation)")
    return replace(parts, train=train, validation=validation)


def stratified(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """A share of the images, of each class as nearly that share as whole images allow, but never all of a class.

    Args:
        labels: of all images, (n,).
        share: above 0, below 1.
        seed: of the choice.

    Returns:
        The numbers of the images, ascending: one at least, unless each class has one image alone.
    """
    generator = np.random.default_rng((seed, 0))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    wanted, most = share * counts, counts - 1
    taken = np.minimum(np.floor(wanted + _ROUND_OFF).astype(np.int64), most)
    # What rounding down left over goes to the largest remainders, in random order where these are equal.
    mixed = generator.permutation(len(counts))
    ranked = mixed[np.argsort((taken - wanted)[mixed], kind="stable")]
    ranked = ranked[(taken < np.minimum(wanted - _ROUND_OFF, most))[ranked]]
    taken[ranked[: max(max(round(share * len(labels)), 1) - int(taken.sum()), 0)]] += 1
    order = generator.permutation(len(labels))
    grouped = order[np.argsort(classes[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(grouped[place < np.repeat(taken, counts)])


_ROUND_OFF = 1e-9  # of a share times a count, which may be a whole number


def _labels(images: ImageSource) -> NDArray[np.int64]:
    """The labels of all images, (n,); images are read only if their labels are not known otherwise."""
    whole, indices = origin(images, np.arange(len(images)))
    known: Sequence[Any] | None = None
    if isinstance(whole, Folder):
        known = [whole.label(index) for index in range(len(whole))]
    elif isinstance(whole, DatasetImages):
        known = dataset_labels(whole)
    if known is None or len(known) != len(whole):
        return np.array([read_labelled(images, index)[1] for index in range(len(images))], dtype=np.int64)
    try:
        return np.asarray(known)[indices].astype(np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"Each image of {images.name} must have a class, a whole number, but not all have.") from error
