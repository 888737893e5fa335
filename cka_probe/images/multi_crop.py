"""Several views of one image, each from the original: the whole, random crops, and random patches of a grid.

As OBoW makes them (Gidaris et al. 2021, arXiv 2012.11552), with sizes in proportion to the network's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cka_probe.errors import SpecError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.sources.bit_depth import on_colours
from cka_probe.runtime.ranges import shown

if TYPE_CHECKING:
    from PIL.Image import Image

GRID = 3
"""Patches are cut from a grid of so many rows and columns."""

_WHOLE, _CROP, _PATCH, _SHEET, _JITTER = 224, 160, 96, 256, 24
"""Pixels in the paper: of the whole image, a crop, a patch, the image that patches are cut from, and their jitter."""

_STEP = 8


@dataclass(frozen=True)
class Crops:
    """How many, and of which size.

    Attributes:
        count: an image; 0 for none.
        size: height and width in pixels.
    """

    count: int
    size: int

    @classmethod
    def parse(cls, text: str, option: str, most: int) -> Crops:
        """From ``"2x160"``, or ``"none"``.

        Args:
            text: what the user wrote.
            option: for the message.
            most: so many at most.

        Raises:
            SpecError: it is written in another way.

        >>> Crops.parse("5x96", "--patches", 9)
        Crops(count=5, size=96)
        """
        found = re.fullmatch(r"([0-9]{1,3})x([0-9]{1,5})", text)
        if text == "none":
            return cls(0, 1)
        if found is None or not 1 <= int(found[1]) <= most or int(found[2]) < 1:
            raise SpecError(
                f"{option} must be none or COUNTxSIZE, with a count from 1 to {most} and a size in pixels, such as "
                f"2x160, but is {shown(text)}."
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.count}x{self.size}" if self.count else "none"


def scaled(size: int) -> tuple[Crops, Crops]:
    """Crops and patches for images of a size: those of the paper in proportion, in steps of 8 px.

    >>> [str(crops) for size in (224, 32) for crops in scaled(size)]
    ['2x160', '5x96', '2x24', '5x16']
    """
    crop, patch = (max(round(size * part / _WHOLE / _STEP), 1) * _STEP for part in (_CROP, _PATCH))
    return Crops(2, crop), Crops(5, patch)


@dataclass(frozen=True)
class MultiCrop:
    """From an image to its views as uint8 tensors. Its random numbers are PyTorch's global ones.

    Called with an image of the network's channels, it gives the whole image as the network sees it, (c, h, w), and a
    tensor (count, c, size, size) for each kind of crops that there is.

    Attributes:
        seen: how the network sees an image.
        crops: random resized crops of 8% to 60% of the area, with colour jitter, gray and blur.
        patches: of a 3 × 3 grid over a crop of 60% to 100% of the area, with colour jitter and gray.
        flip: probability of a horizontal flip, of each view by itself.
    """

    seen: Preprocessing
    crops: Crops
    patches: Crops
    flip: float

    def __call__(self, image: Image) -> tuple[Tensor, ...]:
        """The views of an image."""
        whole, crop, sheet = self._steps
        views = [_pixels(whole(image))]
        if self.crops.count:
            views.append(torch.stack([_pixels(crop(image)) for _ in range(self.crops.count)]))
        if self.patches.count:
            views.append(self._cut(_pixels(sheet(image))))
        return tuple(views)

    @cached_property
    def _steps(self) -> tuple[_Steps, _Steps, _Steps]:
        """For the whole image, a crop, and the image that patches are cut from."""
        from torchvision.transforms import RandomHorizontalFlip

        flip = RandomHorizontalFlip(self.flip)
        sheet = round(self.patches.size * _SHEET / _PATCH)
        return (
            _Steps((replace(self.seen.transform(), normalization=()), flip)),
            _augmented(self.crops.size, (0.08, 0.6), flip, blur=2 * self.crops.size / _CROP),
            _augmented(sheet, (0.6, 1), flip),
        )

    def _cut(self, sheet: Tensor) -> Tensor:
        """Some patches of the grid (count, c, size, size), each moved at random within its part of the sheet."""
        size, jitter = self.patches.size, round(self.patches.size * _JITTER / _PATCH)
        between = (sheet.shape[1] - size - jitter) / (GRID - 1)
        patches = []
        for cell in torch.randperm(GRID**2)[: self.patches.count].tolist():
            top, left = (int(part * between) + int(torch.randint(jitter + 1, ())) for part in divmod(cell, GRID))
            patches.append(sheet[:, top : top + size, left : left + size])
        return torch.stack(patches)


@dataclass(frozen=True)
class _Steps:
    """Functions of images, one after the other; a class, since worker processes that are spawned get it pickled."""

    steps: tuple[Callable[..., Any], ...]

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


@dataclass(frozen=True)
class _OnColours:
    """Steps that are not done to opacity (alpha)."""

    steps: _Steps

    def __call__(self, image: Image) -> Image:
        return on_colours(self.steps, image)


def _augmented(size: int, area: tuple[float, float], flip: Callable[..., Any], blur: float = 0) -> _Steps:
    """A random resized crop, colour jitter with probability 0.8, gray with 0.2, blur with 0.5, and a flip."""
    from torchvision import transforms

    colours = [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        *([transforms.RandomApply([_Blur(blur)], 0.5)] if blur else []),
    ]
    crop = transforms.RandomResizedCrop(size, area, interpolation=transforms.InterpolationMode.BICUBIC)
    return _Steps((crop, _OnColours(_Steps(tuple(colours))), flip))


@dataclass(frozen=True)
class _Blur:
    """A Gaussian blur with a random standard deviation, from a twentieth of ``most`` to ``most`` pixels."""

    most: float

    def __call__(self, image: Image) -> Image:
        from PIL.ImageFilter import GaussianBlur

        return image.filter(GaussianBlur(self.most * (0.05 + 0.95 * float(torch.rand(())))))


def _pixels(image: Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    tensor: Tensor = pil_to_tensor(image)
    return tensor
