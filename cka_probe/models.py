"""A model spec -> a network, its name and its preprocessing.

resnet18, resnet18.a1_in1k, hf-hub:org/name     timm, pretrained
resnet18@random, resnet18@random:7              timm, random weights from seed 0 or 7
resnet18@student.safetensors                    timm, a checkpoint
zoo:cnn, zoo:cnn-2, zoo:cnn@random              the bundled networks
file.py:factory, file.py:factory@weights.pth    any network of the user's own
deit_tiny_patch16_224,img_size=32@random        keyword arguments, before @
name=SPEC                                       any of these under a name of its own
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cka_probe import zoo
from cka_probe.errors import SpecError
from cka_probe.forward import naming_errors
from cka_probe.image_files import in_8_bits
from cka_probe.modules import is_exported, unwrapped
from cka_probe.provenance import FROM_FACTORY
from cka_probe.ranges import IMAGE_SIZE, SEED, Range, shown
from cka_probe.usable_paths import existing_file
from cka_probe.user_files import code_sha256, is_user_file
from cka_probe.views import IDENTITY, View
from cka_probe.weights import (
    known_timm_name,
    load_checkpoint,
    pretrained_timm,
    random_timm,
    timm_with_checkpoint,
    user_network,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_SEED_DIGITS = len(str(2**64))

_ARGUMENTS = {"num_classes": Range(0, 10**7, whole=True), "in_chans": Range(1, 1024, whole=True)}
"""Of the keyword arguments that mean the same to all networks, what they may be."""


@dataclass(frozen=True)
class Preprocessing:
    """From an image to what a network sees, as timm describes it.

    Attributes:
        size: (channels, height, width) of the tensor; 1 channel is gray, 3 are RGB.
        mean: subtracted from each channel, on the scale 0 to 1.
        std: each channel is divided by it.
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

        channels, mode = self.size[0], "L" if self.size[0] == 1 else "RGB"
        steps = create_transform(
            input_size=self.size,
            interpolation=self.interpolation,
            mean=self.mean[:channels],
            std=self.std[:channels],
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        ).transforms
        geometry = next(index for index, step in enumerate(steps) if isinstance(step, MaybeToTensor))
        return Transform(mode, tuple(steps[:geometry]), view, tuple(steps[geometry:]))


@dataclass(frozen=True)
class Transform:
    """From an image to a network's input; a class, since worker processes that are spawned get it pickled.

    Attributes:
        mode: Pillow's name of the channels: ``"L"`` or ``"RGB"``.
        geometry: steps from an image to one of the input's size.
        view: what is done to that image.
        normalization: steps from there to a tensor.
    """

    mode: str
    geometry: tuple[Callable[..., Any], ...]
    view: View
    normalization: tuple[Callable[..., Any], ...]

    def __call__(self, image: Image, identity: str = "") -> Tensor:
        """The (channels, height, width) tensor of an image, whose identity seeds what is random in a view."""
        seen: Any = in_8_bits(image).convert(self.mode)
        for step in self.geometry:
            seen = step(seen)
        seen = self.view(seen, identity)
        for step in self.normalization:
            seen = step(seen)
        tensor: Tensor = seen
        return tensor


@dataclass(frozen=True, eq=False)
class Subject:
    """A network under comparison, seen through a view: its name in the result, and how it sees an image.

    Attributes:
        name: labels its rows and columns.
        network: any `torch.nn.Module`.
        preprocessing: from an image to its input.
        source: where it comes from (spec, weights), for the record.
        view: what is done to its images.
        side: 0, or 1 where it sees the second image of each pair.
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing = Preprocessing()
    source: Mapping[str, Any] = field(default_factory=dict)
    view: View = IDENTITY
    side: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        """Look through the wrappers of ``torch.compile`` and of data parallelism: layers have their own names then."""
        object.__setattr__(self, "network", unwrapped(self.network))

    @property
    def look(self) -> tuple[Preprocessing, View, int]:
        """What its input depends on: subjects with the same look share their images."""
        return self.preprocessing, self.view, self.side


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
        pixels = pixels * torch.tensor(preprocessing.std).double() + torch.tensor(preprocessing.mean).double()
    low, high = pixels.min(), pixels.max()
    if low < -0.01 or high > 1.01:
        pixels = (pixels - low) / (high - low)
    shown: NDArray[np.uint8] = (pixels.clamp(0, 1) * 255).round().byte().numpy()
    return shown


@dataclass(frozen=True)
class ModelSpec:
    """A model spec, taken apart.

    Attributes:
        text: as the user wrote it, without the ``name=``.
        name: of the user's choosing, or the model's own.
        base: ``resnet18``, ``zoo:cnn``, ``hf-hub:org/name`` or ``path/file.py:factory``.
        options: keyword arguments of the model.
        weights: what follows ``@``: ``random``, ``random:SEED`` or a path; None for the model's own.
    """

    text: str
    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Take ``text`` apart.

        Raises:
            SpecError: it is none of the forms above.
        """
        named = re.fullmatch(r"([^=,@/\\:]+)=(.+)", text)
        chosen, spec = named.groups() if named else (None, text)
        described, at, weights = spec.partition("@")
        base, *pairs = _split(described)
        if not base or (at and not weights):
            raise SpecError(f"A model is MODEL, MODEL@random or MODEL@CHECKPOINT, but got {text!r}.")
        options = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (equals and key.strip().isidentifier()):
                raise SpecError(f"After a model's name and a comma must stand key=value, but got {pair!r} in {text!r}.")
            options[key.strip()] = _value(value.strip())
        for key, range_ in _ARGUMENTS.items():
            if key in options:
                range_.check(f"{key} of {base}", options[key])
        return cls(spec, chosen or _own_name(base, weights), base, options, os.path.expanduser(weights) or None)

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None where the weights are not random."""
        kind, _, seed = (self.weights or "").partition(":")
        if kind != "random":
            return None
        if seed and not (seed.isdecimal() and len(seed) <= _SEED_DIGITS):
            raise SpecError(f"After '@random:' must stand a seed, {SEED}, but got {shown(self.text)}.")
        SEED.check("The seed after '@random:'", int(seed or 0))
        return int(seed or 0)


def check_spec(spec: str) -> None:
    """Raise a SpecError where a model spec cannot be understood or names what is not there; nothing is loaded."""
    parsed = ModelSpec.parse(spec)
    if parsed.base.startswith("zoo:"):
        _check_zoo(parsed)
    elif is_user_file(parsed.base):
        existing_file(parsed.base.rpartition(":")[0], parsed.text)
    else:
        known_timm_name(parsed.base)
    if parsed.seed is None and parsed.weights:
        existing_file(parsed.weights, parsed.text, "checkpoint")


def load_subject(spec: str) -> Subject:
    """The subject that a model spec names, its network in evaluation mode on the CPU.

    Args:
        spec: one of the forms at the top of this module.

    Raises:
        SpecError: the spec cannot be understood, or names no model.
        CheckpointError: its checkpoint cannot be read or does not fit.
        HubError: its pretrained weights cannot be fetched.

    >>> load_subject("small=zoo:cnn").name
    'small'
    """
    parsed = ModelSpec.parse(spec)
    build = _zoo if parsed.base.startswith("zoo:") else _from_file if is_user_file(parsed.base) else _timm
    network, weights = build(parsed)
    source = {"spec": parsed.text, "weights": weights}
    if is_user_file(parsed.base):
        source["code_sha256"] = code_sha256(parsed.base)
    network = unwrapped(network)
    if not is_exported(network):  # which has no eval(), and is refused with advice when it runs
        with naming_errors(f"{parsed.name!r} must have an evaluation mode, but its eval() raised"):
            network.eval()
    return Subject(parsed.name, network, preprocessing_of(network, parsed.options), source)


def preprocessing_of(network: nn.Module, options: Mapping[str, Any] | None = None) -> Preprocessing:
    """The preprocessing that a network tells by a ``pretrained_cfg``, as timm's do; ImageNet's at 224 where none.

    Args:
        network: any network.
        options: keyword arguments it was made with: ``img_size`` and ``in_chans`` overrule its configuration.
    """
    config = getattr(network, "pretrained_cfg", None)
    config = getattr(config, "__dict__", config)
    own = Preprocessing.from_config(config) if isinstance(config, Mapping) else Preprocessing()
    options = options or {}
    given = options.get("img_size", own.size[1:])
    height, width = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, given)
    for size in (height, width):
        IMAGE_SIZE.check("img_size", size)
    return replace(own, size=(options.get("in_chans", own.size[0]), height, width))


def _zoo(spec: ModelSpec) -> tuple[nn.Module, str]:
    name = _check_zoo(spec)
    architecture = zoo.ZOO[name.removesuffix("-2")]
    seed = spec.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        network = architecture()
    if seed is not None:
        return network, f"random, seed {seed}"
    path = Path(spec.weights) if spec.weights else zoo.weights_path(name)
    return network, load_checkpoint(network, path)


def _check_zoo(spec: ModelSpec) -> str:
    """The name of a bundled network, without ``zoo:``."""
    name = spec.base.removeprefix("zoo:")
    if name not in zoo.NAMES or spec.options:
        raise SpecError(f"The zoo holds {', '.join(f'zoo:{known}' for known in zoo.NAMES)}, but got {spec.text!r}.")
    return name


def _from_file(spec: ModelSpec) -> tuple[nn.Module, str]:
    seed = spec.seed
    network = user_network(spec.base, spec.options, seed or 0)
    if spec.weights and seed is None:
        return network, load_checkpoint(network, Path(spec.weights))
    return network, FROM_FACTORY if seed is None else f"random, seed {seed}"


def _timm(spec: ModelSpec) -> tuple[nn.Module, str]:
    if spec.weights is None:
        network, weights = pretrained_timm(spec.base, spec.options)
        config: Any = network.pretrained_cfg
        classes, pretrained = spec.options.get("num_classes", 0), config.get("num_classes")
        if classes not in (0, pretrained):
            raise SpecError(
                f"The pretrained weights of {spec.base!r} have {pretrained} classes; with num_classes={classes} its "
                f"classifier would be random. Leave num_classes out, use 0 for none, or {spec.base}@CHECKPOINT."
            )
        return network, weights
    if spec.seed is not None:
        return random_timm(spec.base, spec.options, spec.seed), f"random, seed {spec.seed}"
    return timm_with_checkpoint(spec.base, spec.options, Path(spec.weights))


def _own_name(base: str, weights: str) -> str:
    """``resnet18`` of ``resnet18``, ``resnet18@random``, ``net@best`` of ``models/net.py:net@runs/best.pth``."""
    name = base.rpartition(":")[2] if is_user_file(base) else base
    if weights and not weights.startswith("random"):
        weights = Path(weights).stem
    return f"{name}@{weights}" if weights else name


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> Any:
    """A Python literal where it is one, ``true`` and ``false`` too, else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
