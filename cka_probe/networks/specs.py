"""A model spec -> its parts.

resnet18, resnet18.a1_in1k, hf-hub:org/name     timm, pretrained
resnet18@random, resnet18@random:7              timm, random weights from seed 0 or 7
resnet18@student.safetensors                    timm, a checkpoint
runs/vit, ./vit, local-dir:vit                  the folder of a distillation, or one with a timm config.json
runs/vit@best.safetensors                       another weights file of that folder
zoo:cnn, zoo:cnn-2, zoo:cnn@random              the bundled networks
file.py:factory, file.py:factory@weights.pth    any network of the user's own
deit_tiny_patch16_224,img_size=32@random        keyword arguments, before @
resnet18,view_size=128                          the size of its images, preprocessing only
name=SPEC                                       any of these under a name of its own
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.networks import zoo
from cka_probe.networks.folders import folder_named, holds_model, read_folder
from cka_probe.networks.weights import known_timm_name
from cka_probe.runtime.paths import existing_file
from cka_probe.runtime.ranges import IMAGE_SIZE, SEED, Range, shown
from cka_probe.runtime.user_files import is_user_file

_SEED_DIGITS = len(str(2**64))

_ARGUMENTS = {"num_classes": Range(0, 10**7, whole=True), "in_chans": Range(1, 1024, whole=True)}
"""Of the keyword arguments that mean the same to all networks, what they may be."""


@dataclass(frozen=True)
class ModelSpec:
    """A model spec, taken apart.

    Attributes:
        text: as the user wrote it, without the ``name=``.
        name: of the user's choosing, or the model's own.
        base: ``resnet18``, ``zoo:cnn``, ``hf-hub:org/name``, ``path/file.py:factory`` or a folder.
        options: keyword arguments of the model.
        weights: what follows ``@``: ``random``, ``random:SEED`` or a path; None for the model's own.
        view_size: (height, width) of its images, in place of the model's own.
    """

    text: str
    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    view_size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Take ``text`` apart.

        Raises:
            SpecError: it is none of the forms above.
        """
        named = re.fullmatch(r"([^=,@/\\:]+)=(.+)", text)
        chosen, spec = named.groups() if named else (None, text)
        if set(spec) & set(",@") and holds_model(Path(os.path.expanduser(spec.removeprefix("local-dir:")))):
            return cls(spec, chosen or _own_name(spec, ""), spec)  # a folder with these characters in its name
        described, at, weights = spec.partition("@")
        base, *pairs = _split(described)
        if not base or (at and not weights):
            raise SpecError(f"A model is MODEL, MODEL@random or MODEL@CHECKPOINT, but got {text!r}.")
        options = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not (equals and key.strip().isidentifier()):
                raise SpecError(f"Options after a model's name must be key=value, but got {pair!r} in {text!r}.")
            options[key.strip()] = _value(value.strip())
        for key, range_ in _ARGUMENTS.items():
            if key in options:
                range_.check(f"{key} of {base}", options[key])
        size = _size(options.pop("view_size")) if "view_size" in options else None
        return cls(spec, chosen or _own_name(base, weights), base, options, os.path.expanduser(weights) or None, size)

    @property
    def folder(self) -> Path | None:
        """The folder that it names; None for a spec of another kind."""
        return folder_named(self.base)

    @property
    def built(self) -> str:
        """The spec that builds the network, without name and weights, the file of a factory by its full path."""
        base = self.base
        if is_user_file(base):
            file, _, factory = base.rpartition(":")
            base = f"{os.path.abspath(os.path.expanduser(file))}:{factory}"
        return ",".join([base, *(f"{key}={value!r}" for key, value in self.options.items())])

    @property
    def seed(self) -> int | None:
        """The seed of random weights; None where the weights are not random."""
        kind, _, seed = (self.weights or "").partition(":")
        if kind != "random":
            return None
        if seed and not (seed.isdecimal() and len(seed) <= _SEED_DIGITS):
            raise SpecError(f"'@random:' must be followed by a seed, {SEED}, but got {shown(self.text)}.")
        SEED.check("The seed after '@random:'", int(seed or 0))
        return int(seed or 0)


def check_spec(spec: str) -> None:
    """Raise a SpecError where a model spec cannot be understood or names what is not there; nothing is loaded."""
    parsed = ModelSpec.parse(spec)
    if parsed.folder is not None:
        parsed.seed  # noqa: B018  # it checks what follows @random
        read_folder(parsed.folder, parsed.weights if parsed.seed is None else None)
        return
    if parsed.base.startswith("zoo:"):
        check_zoo(parsed)
    elif is_user_file(parsed.base):
        existing_file(parsed.base.rpartition(":")[0], parsed.text)
    else:
        known_timm_name(parsed.base)
    if parsed.seed is None and parsed.weights:
        existing_file(parsed.weights, parsed.text, "checkpoint")


def check_zoo(spec: ModelSpec) -> str:
    """The name of a bundled network, without ``zoo:``."""
    name = spec.base.removeprefix("zoo:")
    if name not in zoo.NAMES or not spec.options.keys() <= zoo.OPTIONS.keys():
        raise SpecError(
            f"The zoo holds {', '.join(f'zoo:{known}' for known in zoo.NAMES)}, which take the options "
            f"{' and '.join(zoo.OPTIONS)}, but got {spec.text!r}."
        )
    odd = [key for key, value in spec.options.items() if value != zoo.OPTIONS[key]]
    if odd and spec.weights is None:
        own = " and ".join(f"{key}={value}" for key, value in zoo.OPTIONS.items())
        raise SpecError(f"The bundled weights of zoo:{name} have {own}. For another {odd[0]}, use {spec.text}@random.")
    return name


def _own_name(base: str, weights: str) -> str:
    """``resnet18`` of ``resnet18``, ``net@best`` of ``models/net.py:net@runs/best.pth``, ``vit`` of ``runs/vit``."""
    folder = folder_named(base)
    name = base.rpartition(":")[2] if is_user_file(base) else base
    name = folder.resolve().name or base if folder is not None else name
    if weights and not weights.startswith("random"):
        weights = Path(weights).stem
    return f"{name}@{weights}" if weights else name


def _size(value: Any) -> tuple[int, int]:
    """(height, width) of ``view_size=128`` or ``view_size=(128,96)``."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or any(side not in IMAGE_SIZE for side in sides):
        raise SpecError(f"view_size must be a size in pixels, 128 or (128,96), but is {shown(value)}.")
    return sides[0], sides[1]


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
