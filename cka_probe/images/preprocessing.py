"""From an image to what a network sees, and back to pixels for a human eye."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cka_probe.images.sources.bit_depth import MODES, as_mode
from cka_probe.images.views import IDENTITY, View
from cka_probe.runtime.ranges import IMAGE_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """From an image to what a network sees, as timm describes it.

    Attributes:
        size: (channels, height, width) of the tensor; 1 channel is gray, 3 are RGB, 2 and 4 these with opacity (alpha).
        mean: subtracted from each channel, on the scale 0 to 1. Given for other channels, gray and opacity get the
            average of the colours.
        std: each channel is divided by it; as for the mean.
        interpolation: ``"bilinear"``, ``"bicubic"``, ...
        crop_pct: share of the resized image that the crop keeps, above 0 to 1.
        crop_mode: ``"center"``, ``"squash"`` or ``"border"``, as timm names them.
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, _for_channels(getattr(self, name), self.size[0]))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From timm's ``pretrained_cfg`` of a model, with ImageNet's values where it is silent."""
        from timm.data import resolve_data_config

        resolved = resolve_data_config({}, pretrained_cfg=dict(config))
        # A configuration from the Hub is JSON: its sequences are lists.
        return cls(
            size=tuple(resolved["input_size"]),
            mean=tuple(map(float, resolved["mean"])),
            std=tuple(map(float, resolved["std"])),
            **{name: resolved[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        )

    def transform(self, view: View = IDENTITY) -> Transform:
        """The function from an image, and its identity, to a (channels, height, width) float32 tensor.

        Args:
            view: applied between the geometry (resizing and cropping) and the normalization.
        """
        from timm.data import create_transform
        from timm.data.transforms import MaybeToTensor

        steps = create_transform(
            input_size=self.size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        ).transforms
        geometry = next(index for index, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        return Transform(MODES.get(self.size[0], ""), tuple(steps[:geometry]), view, tuple(steps[geometry:]))


@dataclass(frozen=True)
class Transform:
    """From an image to a network's input; a class, since worker processes that are spawned get it pickled.

    Attributes:
        mode: Pillow's name of the channels, one of `MODES`; empty where images have no such channels.
        geometry: steps from an image to one of the input's size.
        view: what is done to that image.
        normalization: steps from there to a tensor.
    """

    mode: str
    geometry: tuple[Callable[..., Any], ...]
    view: View
    normalization: tuple[Callable[..., Any], ...]

    def __call__(self, image: Image, identity: str = "") -> Tensor:
        """The (channels, height, width) tensor of an image, whose identity seeds what is random in a view.

        Raises:
            DataError: the image has no such channels.
            ValueError: its pixels have no known range.
        """
        seen: Any = as_mode(image, self.mode)
        for step in self.geometry:
            seen = step(seen)
        seen = self.view(seen, identity)
        for step in self.normalization:
            seen = step(seen)
        tensor: Tensor = seen
        return tensor


def preprocessing_of(
    network: nn.Module, options: Mapping[str, Any] | None = None, own: Preprocessing | None = None
) -> Preprocessing:
    """The preprocessing that a network states in a ``pretrained_cfg``, as timm's do; ImageNet's at 224 where none.

    Args:
        network: any network.
        options: keyword arguments it was made with: ``img_size`` and ``in_chans`` overrule its configuration.
        own: what stands beside its weights, in place of its ``pretrained_cfg``.
    """
    if own is None:
        config = getattr(network, "pretrained_cfg", None)
        config = getattr(config, "__dict__", config)
        own = Preprocessing.from_config(config) if isinstance(config, Mapping) else Preprocessing()
    options = options or {}
    given = options.get("img_size", own.size[1:])
    height, width = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, given)
    for size in (height, width):
        IMAGE_SIZE.check("img_size", size)
    return replace(own, size=(options.get("in_chans", own.size[0]), height, width))


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number for each channel; gray and opacity get the average of the colours."""
    if len(values) == channels:
        return values
    colours = values[:3] if channels >= 3 and len(values) >= 3 else ()
    average = sum(values) / len(values)
    return (*colours, *[average] * (channels - len(colours)))


def as_pixels(images: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """What a network sees, for a human eye.

    Args:
        images: (n, c, h, w) as the network gets them.
        preprocessing: whose normalization is undone.

    Returns:
        (n, h, w, c), c being 1 or 3. Images that this preprocessing did not make are stretched to the whole range.
    """
    channels = 1 if images.shape[1] < 3 else 3
    pixels = images[:, :channels].detach().double().cpu().movedim(1, -1)
    if images.shape[1] == len(preprocessing.mean):
        std, mean = (torch.tensor(values[:channels]).double() for values in (preprocessing.std, preprocessing.mean))
        pixels = pixels * std + mean
    low, high = pixels.min(), pixels.max()
    if low < -0.01 or high > 1.01:
        pixels = (pixels - low) / (high - low)
    shown: NDArray[np.uint8] = (pixels.clamp(0, 1) * 255).round().byte().numpy()
    return shown
