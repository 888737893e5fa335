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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cka_probe import zoo
from cka_probe.errors import SpecError
from cka_probe.forward import naming_errors
from cka_probe.images.preprocessing import Preprocessing, preprocessing_of
from cka_probe.modules import is_exported, unwrapped
from cka_probe.provenance import FROM_FACTORY
from cka_probe.ranges import SEED, Range, shown
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
    pass

_SEED_DIGITS = len(str(2**64))

_ARGUMENTS = {"num_classes": Range(0, 10**7, whole=True), "in_chans": Range(1, 1024, whole=True)}
"""Of the keyword arguments that mean the same to all networks, what they may be."""


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
