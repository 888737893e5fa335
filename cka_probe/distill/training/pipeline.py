"""Batches for training: each augmented once, and seen by student and teacher with their own size and normalization.

All randomness is a function of the seed, the epoch and the image, or of the seed, the process and the step: nothing
that a worker process or a generator holds is needed to go on from any step of any epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cka_probe.errors import DataError, SpecError
from cka_probe.images.loading_time import explaining_lost_workers
from cka_probe.images.multi_crop import MultiCrop
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.sources.bit_depth import MODES, as_mode, has_opacity, on_colours
from cka_probe.images.sources.files import naming_unreadable
from cka_probe.images.sources.source import ImageSource, read_labelled
from cka_probe.runtime.devices import cores
from cka_probe.runtime.randomness import seed_everything

if TYPE_CHECKING:
    from PIL.Image import Image

    from cka_probe.distill.config import Training

_SMALL = 64 * 64
_CHECKED = 100  # images
_GEOMETRIC = ("Rotate", "Shear", "Translate")
"""How timm's names of operations begin that move pixels, opacity (alpha) with them."""


def epoch_order(images: int, *, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of the images, another one each epoch."""
    return np.random.default_rng((seed, epoch)).permutation(images)


@dataclass(frozen=True)
class Batch:
    """What the loader yields.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,).
        indices: (n,) the numbers of the images.
        crops: for each kind of crops (n, k, c, h, w) uint8; none, unless the method wants some.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    crops: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._with(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the loader calls it."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        crops = tuple(map(change, self.crops))
        return Batch(change(self.images), change(self.labels), change(self.indices), crops)


@dataclass(frozen=True)
class TrainingImages:
    """The training set in batches.

    Attributes:
        source: the images.
        config: augmentation, batch size, seed.
        size: (channels, height, width) of the augmented images: the larger of what student and teacher see.
        rank: which process this is, from 0.
        world: how many processes there are.
        plain: how an image is seen where nothing is done to it; None where it is augmented.
        crops: the views of an image that a method wants, in place of the augmentation of ``config``.
    """

    source: ImageSource
    config: Training
    size: tuple[int, int, int]
    rank: int = 0
    world: int = 1
    plain: Preprocessing | None = None
    crops: MultiCrop | None = None

    @property
    def steps(self) -> int:
        """Steps an epoch: whole batches alone, and whole groups of them where gradients accumulate."""
        steps = len(self.source) // (self.config.batch_size * self.world)
        return steps - steps % self.config.accumulate

    def epoch(self, epoch: int, *, first: int = 0, pin: bool = False) -> Iterator[Batch]:
        """The batches of an epoch from its step ``first`` on.

        Raises:
            DataError: an image cannot be read.
        """
        yield from self._loaded(self.numbers(epoch, first), epoch, pin=pin)

    def numbers(self, epoch: int, first: int = 0) -> list[list[int]]:
        """Which images are in this process's batches of an epoch, from its step ``first`` on."""
        n, world = self.config.batch_size, self.world
        order = epoch_order(len(self.source), seed=self.config.seed, epoch=epoch)
        together = order[first * n * world : self.steps * n * world].reshape(-1, world, n)
        batches: list[list[int]] = together[:, self.rank].tolist()
        return batches

    def in_order(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """These images, as they are seen in the first epoch.

        Raises:
            DataError: an image cannot be read.
        """
        n = self.config.batch_size
        yield from self._loaded([list(numbers[i : i + n]) for i in range(0, len(numbers), n)], epoch=0, pin=False)

    def _loaded(self, batches: list[list[int]], epoch: int, *, pin: bool) -> Iterator[Batch]:
        transform: Callable[[Image], Tensor | tuple[Tensor, ...]]
        if self.crops is not None:
            transform = self.crops
        else:
            transform = augmentation(self.config, self.size) if self.plain is None else _unchanged(self.plain)
        loader = DataLoader(
            _Augmented(self.source, transform, self.size[0], self.config.seed, epoch),
            batch_sampler=batches,
            num_workers=default_workers(self.source, self.config.workers),
            collate_fn=_collate,
            pin_memory=pin,
        )
        for batch in explaining_lost_workers(loader):
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch


def _unchanged(seen: Preprocessing) -> Callable[[Image], Tensor]:
    """From an image to the (c, h, w) uint8 tensor whose normalization evaluation would show."""
    from timm.data.transforms import MaybePILToTensor

    return replace(seen.transform(), normalization=(MaybePILToTensor(),))


def check_channels(network: str, seen: Preprocessing, images: ImageSource) -> None:
    """Raise where a network takes channels that images do not have: a hundred of them, spread over all, are read.

    Args:
        network: its name.
        seen: how it sees images.
        images: of the data.

    Raises:
        SpecError: no image has so many channels.
        DataError: an image lacks opacity (alpha), or cannot be read.
    """
    channels = seen.size[0]
    mode = MODES.get(channels)
    if mode is None:
        raise SpecError(
            f"{network!r} takes {channels} channels, but images have 1 (gray), 2 (gray and opacity), 3 (RGB) or 4 (RGB "
            "and opacity). Build it for one of these (in_chans)."
        )
    if mode in ("L", "RGB"):
        return
    for index in np.unique(np.linspace(0, len(images) - 1, min(len(images), _CHECKED)).astype(int)).tolist():
        image, _ = read_labelled(images, index)
        if not has_opacity(image):
            raise DataError(
                f"{network!r} takes {channels} channels, the last of them opacity (alpha), but {images.place(index)} "
                f"has none: its mode is {image.mode}. Use images of mode {mode}, or in_chans={channels - 1}."
            )


def default_workers(source: ImageSource, workers: int | None) -> int:
    """Processes that prepare images: as asked for; else none where that is cheap, or a core less than there are."""
    if workers is not None:
        return workers
    cheap = source.in_memory and math.prod(read_labelled(source, 0)[0].size) <= _SMALL
    return 0 if cheap and cores() <= 2 else max(1, min(8, cores() - 1))


def augmentation(config: Training, size: tuple[int, int, int]) -> Callable[[Image], Tensor]:
    """From an image to a (c, h, w) uint8 tensor by timm's training transform; erasing and mixing come on the device.

    Raises:
        SpecError: timm cannot read ``--rand-augment``.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, create_transform

    fill = Preprocessing(size, mean=IMAGENET_DEFAULT_MEAN).mean
    try:
        transform: Any = create_transform(
            input_size=size,
            is_training=True,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            hflip=config.flip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.rand_augment,
            interpolation="bicubic",
            mean=fill,
            normalize=False,
        )
    except (AssertionError, ValueError, LookupError) as error:
        raise SpecError(
            f"--rand-augment must be written as timm does, rand-m9-mstd0.5, but is {config.rand_augment!r}: {error}"
        ) from error
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):  # of RandAugment
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
            if len(fill) == 1 and "fillcolor" in operation.kwargs:
                operation.kwargs["fillcolor"] = round(255 * fill[0])
            if len(fill) in (2, 4) and not operation.name.startswith(_GEOMETRIC):
                operation.aug_fn = partial(on_colours, operation.aug_fn)
    result: Callable[[Image], Tensor] = transform
    return result


class Views:
    """On the device: from augmented uint8 images to what student and teacher see, and the target.

    Mixup, cutmix and erasing are done once, on the student's normalized images; the teacher sees those very pixels
    through its own normalization and at its own size.

    Args:
        config: augmentation.
        classes: of the target.
        student: how the student sees an image.
        teacher: how the teacher does.
        device: of the images.
    """

    def __init__(
        self, config: Training, classes: int, student: Preprocessing, teacher: Preprocessing, device: torch.device
    ) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self._student, self._teacher = student, teacher
        self._mean, self._std = (_per_channel(values, device) for values in (student.mean, student.std))
        mean, std = (_per_channel(values, device) for values in (teacher.mean, teacher.std))
        self._scale, self._shift = self._std / std, (self._mean - mean) / std
        self._same = student.size == teacher.size and bool((self._scale == 1).all() and (self._shift == 0).all())
        self._erase = RandomErasing(config.erasing, mode="pixel", device=device) if config.erasing else None
        self._mix = None
        if config.mixup or config.cutmix:
            self._mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)

    def __call__(self, batch: Batch) -> tuple[Tensor, Callable[[], Tensor], Tensor]:
        """The student's images, what makes the teacher's, (n, c, h, w) float32, and the target (n,) or (n, c)."""
        images: Tensor = (batch.images.float() / 255 - self._mean) / self._std
        target: Tensor = batch.labels
        if self._erase is not None:
            images = self._erase(images)
        if self._mix is not None:
            images, target = self._mix(images, target)
        if self._same:
            return images, lambda: images, target
        return (
            _resized(images, self._student.size),
            lambda: _resized(images * self._scale + self._shift, self._teacher.size),
            target,
        )


class CropViews:
    """On the device: from uint8 images and crops to what student and teacher see.

    Args:
        seen: how both networks see an image.
        device: of the images.
    """

    def __init__(self, seen: Preprocessing, device: torch.device) -> None:
        self._mean, self._std = (_per_channel(values, device) for values in (seen.mean, seen.std))

    def __call__(self, batch: Batch) -> tuple[tuple[Tensor, ...], Callable[[], Tensor], Tensor]:
        """For the student each kind of crops (n · k, c, h, w), what makes the teacher's whole images, the labels (n,).

        The k crops of an image are next to each other.
        """
        crops = tuple(self._normalized(crops.flatten(0, 1)) for crops in batch.crops)
        return crops, lambda: self._normalized(batch.images), batch.labels

    def _normalized(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std


_Item = tuple[Tensor | tuple[Tensor, ...], int, int]


class _Augmented(Dataset[Any]):
    """One augmented image, its label and its number; or the message of what is wrong with it."""

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image], Tensor | tuple[Tensor, ...]],
        channels: int,
        seed: int,
        epoch: int,
    ) -> None:
        self._source, self._transform = source, transform
        self._mode = MODES.get(channels, "")
        self._key = (seed, epoch)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> _Item | str:
        seed_everything(*self._key, index)
        try:
            image, label = read_labelled(self._source, index)
            with naming_unreadable(self._source.place(index)):
                image = as_mode(image, self._mode)
            return self._transform(image), label, index
        except DataError as error:
            return str(error)  # raised, it would come from a worker with that process's traceback in its message


def _collate(items: list[_Item | str]) -> Batch | str:
    good = []
    for item in items:
        if isinstance(item, str):
            return item
        good.append(item)
    views, labels, indices = zip(*good, strict=True)
    of_each = [view if isinstance(view, tuple) else (view,) for view in views]
    images, *crops = (torch.stack(part) for part in zip(*of_each, strict=True))
    return Batch(images, torch.tensor(labels), torch.tensor(indices), tuple(crops))


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """Keep some bits of each pixel. timm 1.0.31 asks for 0 at times, which Pillow 13.0 refuses: it means 1 here."""
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _resized(images: Tensor, size: tuple[int, int, int]) -> Tensor:
    if images.shape[-2:] == size[1:]:
        return images
    return F.interpolate(images, size=size[1:], mode="bilinear", antialias=True, align_corners=False)
