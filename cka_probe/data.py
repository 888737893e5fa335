"""A data spec -> images in a fixed, seeded order; each read once, and turned into one tensor a subject."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cka_probe.errors import DataError, SpecError
from cka_probe.kernels import MIN_EXAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {
    "validation": ("validation", "val", "valid", "test"),
    "train": ("train", "training"),
}
DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

Transform = Callable[["Image"], Tensor]


class ImageSource(Protocol):
    """Images that can be read by number, each with an identity of its own."""

    name: str

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image | Tensor: ...

    def identity(self, index: int) -> str: ...


@dataclass(frozen=True)
class Samples:
    """Chosen images in a fixed order.

    Attributes:
        source: where they come from.
        indices: which, in order.
        sha256: of their identities (paths or numbers, not pixels), in order: two runs on the same data with the same
            hash saw the same images.
    """

    source: ImageSource
    indices: tuple[int, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.indices)


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
            ``"torch/cifar100"``, ``"hfds/..."``, ``"wds/..."``, ``"tfds/..."`` as timm's ``create_dataset`` knows
            them; or, from Python, any dataset (or tensor, n first) of images or of tuples that start with one. A PIL
            image is preprocessed for each subject; a (c, h, w) tensor goes to every network as it is.
        split: ``"train"`` or ``"validation"``, or a data set's own name for one. Without it: the validation part of
            a folder or data set that has one, and all of the digits.
        data_dir: where a data set lies, for specs with a ``/`` prefix.
        download: fetch the data set where it can be.

    Raises:
        SpecError: the spec names nothing.
        DataError: the data are missing, or hold no image.
    """
    if not isinstance(spec, (str, Path)):
        kind = _Stream if isinstance(spec, IterableDataset) else _Dataset
        if not hasattr(spec, "__len__"):
            raise SpecError(f"A dataset must tell its length, but {type(spec).__name__} has no __len__.")
        return kind(spec, type(spec).__name__)
    text = os.path.expanduser(str(spec))
    if (data_dir or download) and not text.startswith(DATASET_PREFIXES):
        raise SpecError(
            f"--data-dir and --download are for data sets ({', '.join(DATASET_PREFIXES)}), but the data are {text!r}."
        )
    if text == "digits":
        return _Digits(split)
    if text.startswith(DATASET_PREFIXES):
        return _timm_dataset(text, split or "validation", data_dir, download)
    if not os.path.isdir(text):
        raise SpecError(
            f"The data must be 'digits', a folder of images, or a data set such as torch/cifar100 "
            f"(prefixes: {', '.join(DATASET_PREFIXES)}), but {text!r} is none of these."
        )
    return _Folder(Path(text), split)


def sample(source: ImageSource, examples: int, seed: int) -> Samples:
    """``examples`` of the images (all, where there are fewer), drawn without replacement from ``seed``.

    Their order is random too: in the order of a folder, a batch would hold a class or two. Of a data set that can
    only be read in its own order (``wds/``, ``tfds/``, ``hfids/``) the first ones are taken.

    Raises:
        DataError: there are fewer than 4.
    """
    if len(source) < MIN_EXAMPLES or examples < MIN_EXAMPLES:
        raise DataError(
            f"CKA needs at least {MIN_EXAMPLES} examples, but {min(len(source), examples)} "
            f"were {'asked for' if examples < len(source) else f'found in {source.name}'}."
        )
    if examples > len(source):
        logger.info("%s holds %d images; %d were asked for, all are used.", source.name, len(source), examples)
    if isinstance(source, _Stream):
        indices = tuple(range(min(examples, len(source))))
    else:
        indices = tuple(np.random.default_rng(seed).permutation(len(source))[:examples].tolist())
    identities = "\n".join(source.identity(index) for index in indices)
    return Samples(source, indices, hashlib.sha256(identities.encode()).hexdigest())


def holds_tensors(samples: Samples) -> bool:
    """Whether the samples are tensors, which go to every network as they are, and not images."""
    stream = samples.source
    if not isinstance(stream, _Stream):
        return isinstance(_read(samples, 0), Tensor)
    try:
        return isinstance(next(iter(stream), None), Tensor)
    except _READ_ERRORS:
        return False  # the first batch will tell


def batches(
    samples: Samples, transforms: Sequence[Transform], *, batch_size: int, workers: int, pin_memory: bool = False
) -> Iterator[list[Tensor]]:
    """The images batch by batch: a list of one (n, c, h, w) tensor a transform, all of the same n images.

    A last batch of fewer than 4 is dropped.

    Raises:
        DataError: an image cannot be read; the message names it. Or a stream ends before it should.
    """
    stream = isinstance(samples.source, _Stream)
    loader = DataLoader(
        _TransformedStream(samples, transforms) if stream else _Transformed(samples, transforms),
        batch_size=batch_size,
        num_workers=min(workers, 1 if stream else math.ceil(len(samples) / batch_size)),
        pin_memory=pin_memory,
        collate_fn=_collate,
    )
    seen = 0
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        seen += len(batch[0])
        if len(batch[0]) >= MIN_EXAMPLES:
            yield batch
    if seen < len(samples):
        raise DataError(
            f"{samples.source.name} must yield {len(samples)} images, of the {len(samples.source)} that it says it "
            f"has, but ended after {seen}. Ask for fewer with --examples."
        )


def default_workers(source: ImageSource) -> int:
    """How many processes should decode images: none for the digits, which lie in memory; else a core less than all."""
    return 0 if isinstance(source, _Digits) else max(1, min(8, (os.cpu_count() or 2) - 1))


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


class _Digits:
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


class _Folder:
    """Images below a folder, in the order of their paths."""

    def __init__(self, root: Path, split: str | None) -> None:
        self._root = _split_folder(root, split)
        self.name = str(self._root)
        self._paths = sorted(
            os.path.relpath(os.path.join(folder, file), self._root)
            for folder, _, files in os.walk(self._root, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not self._paths:
            raise DataError(f"{self._root} must hold images ({', '.join(SUFFIXES)}), but no file below it is one.")

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image:
        import PIL.Image

        with PIL.Image.open(self._root / self._paths[index]) as file:
            image: Image = file
            image.load()
        return image

    def identity(self, index: int) -> str:
        return self._paths[index]


class _Dataset:
    """A dataset of images, or of tuples that start with one."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> Image | Tensor:
        return _as_image(self._dataset[index], self.identity(index))

    def identity(self, index: int) -> str:
        return f"{self.name}/{index}"


class _TimmImages(_Dataset):
    """A data set of timm's, read through its reader: its own access puts the next image in place of a broken one."""

    def image(self, index: int) -> Image | Tensor:
        import PIL.Image

        item, _ = self._dataset.reader[index]
        if not isinstance(item, PIL.Image.Image):
            item = PIL.Image.open(item)
            item.load()
        return _as_image(item, self.identity(index))


class _Stream(_Dataset):
    """A dataset that can only be read in its own order."""

    def __iter__(self) -> Iterator[Image | Tensor]:
        for index, item in enumerate(self._dataset):
            yield _as_image(item, self.identity(index))


class _Transformed(Dataset[Any]):
    def __init__(self, samples: Samples, transforms: Sequence[Transform]) -> None:
        self._samples = samples
        self._transforms = transforms

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> list[Tensor] | str:
        image = _read(self._samples, position)
        return image if isinstance(image, str) else _prepared(image, self._transforms, self._samples, position)


class _TransformedStream(IterableDataset[Any]):
    def __init__(self, samples: Samples, transforms: Sequence[Transform]) -> None:
        self._samples = samples
        self._transforms = transforms

    def __iter__(self) -> Iterator[list[Tensor] | str]:
        assert isinstance(self._samples.source, _Stream)
        images = iter(self._samples.source)
        for position in self._samples.indices:
            try:
                image = next(images)
            except StopIteration:
                return
            except _READ_ERRORS as error:
                yield _unreadable(self._samples, position, error)
                return
            yield _prepared(image, self._transforms, self._samples, position)


_READ_ERRORS = (OSError, ValueError, SyntaxError, DataError)  # what Pillow raises of broken files


def _read(samples: Samples, position: int) -> Image | Tensor | str:
    """An image, or why there is none: raised in a worker process, that would come with the worker's traceback."""
    try:
        return samples.source.image(samples.indices[position])
    except _READ_ERRORS as error:
        return _unreadable(samples, position, error)


def _prepared(
    image: Image | Tensor, transforms: Sequence[Transform], samples: Samples, position: int
) -> list[Tensor] | str:
    """The tensor of an image for each transform; a tensor is what the networks see already."""
    try:
        return [image if isinstance(image, Tensor) else transform(image) for transform in transforms]
    except _READ_ERRORS as error:
        return _unreadable(samples, position, error)


def _unreadable(samples: Samples, position: int, error: Exception) -> str:
    source, identity = samples.source, samples.source.identity(samples.indices[position])
    where = os.path.join(source.name, identity) if isinstance(source, _Folder) else identity
    return f"{where} must be an image, but could not be read: {type(error).__name__}: {error}"


def _collate(items: list[list[Tensor] | str]) -> list[Tensor] | str:
    tensors = []
    for item in items:
        if isinstance(item, str):
            return item
        tensors.append(item)
    return [torch.stack(column) for column in zip(*tensors, strict=True)]


def _canonical(split: str | None) -> str | None:
    """``"validation"`` and ``"train"`` for their other names; any other split as it is."""
    return next((name for name, names in SPLITS.items() if split in names), split)


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split below ``root``; ``root`` itself where it has none and none was asked for.

    Unasked, only where all folders below ``root`` are splits: "train" is the name of a class too.
    """
    wanted = (split,) if split else (*SPLITS["validation"], *SPLITS["train"])
    if not split and not {path.name for path in root.iterdir() if path.is_dir()} <= set(wanted):
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
        return _Stream(dataset, name)
    return _TimmImages(dataset, name) if isinstance(dataset, ImageDataset) else _Dataset(dataset, name)


def _as_image(item: Any, identity: str) -> Image | Tensor:
    from PIL.Image import Image as PILImage

    image = item[0] if isinstance(item, (tuple, list)) else item
    if isinstance(image, PILImage) or (isinstance(image, Tensor) and image.ndim == 3):
        return image
    shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
    raise DataError(
        f"{identity} must be a PIL image or a (c, h, w) tensor, or a tuple that starts with one, but is "
        f"{type(image).__name__}{shape}."
    )
