"""A model spec -> a network, its name and its preprocessing.

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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cka_probe.activations.modules import is_exported, unwrapped
from cka_probe.errors import SpecError
from cka_probe.images.preprocessing import Preprocessing, preprocessing_of
from cka_probe.images.views import IDENTITY, View
from cka_probe.networks import zoo
from cka_probe.networks.checkpoints import load_checkpoint
from cka_probe.networks.config import ModelConfig, read_model_config, warn_once
from cka_probe.networks.folders import folder_named, holds_model, read_folder
from cka_probe.networks.weights import (
    known_timm_name,
    loaded_as_built,
    pretrained_timm,
    random_timm,
    reset_classifier,
    takes_classes,
    timm_with_checkpoint,
    user_network,
)
from cka_probe.runtime.paths import existing_file
from cka_probe.runtime.provenance import FROM_FACTORY
from cka_probe.runtime.ranges import IMAGE_SIZE, SEED, Range, shown
from cka_probe.runtime.user_code import naming_errors
from cka_probe.runtime.user_files import code_sha256, is_user_file

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
        classes: names of its classes, in the order of its logits; empty where unknown.
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing = Preprocessing()
    source: Mapping[str, Any] = field(default_factory=dict)
    view: View = IDENTITY
    side: Literal[0, 1] = 0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Look through the wrappers of ``torch.compile`` and of data parallelism: layers have their own names then."""
        object.__setattr__(self, "network", unwrapped(self.network))

    @property
    def input_variant(self) -> tuple[Preprocessing, View, int]:
        """What its input depends on: subjects with the same variant share their images."""
        return self.preprocessing, self.view, self.side


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
        _check_zoo(parsed)
    elif is_user_file(parsed.base):
        existing_file(parsed.base.rpartition(":")[0], parsed.text)
    else:
        known_timm_name(parsed.base)
    if parsed.seed is None and parsed.weights:
        existing_file(parsed.weights, parsed.text, "checkpoint")


def load_subject(spec: str, *, classes: int | None = None) -> Subject:
    """The subject that a model spec names, its network in evaluation mode on the CPU.

    A config.json of timm's beside the weights says how the network sees images, where the spec does not.

    Args:
        spec: one of the forms at the top of this module.
        classes: for a factory that needs their number, where the spec does not.

    Raises:
        SpecError: the spec cannot be understood, or names no model.
        CheckpointError: its checkpoint or config.json cannot be read or does not fit.
        HubError: its pretrained weights cannot be fetched.

    >>> load_subject("small=zoo:cnn").name
    'small'
    """
    given = ModelSpec.parse(spec)
    parsed, config, size = _with_config(given)
    checkpoint = parsed.weights is not None and parsed.seed is None  # which says how many
    if classes is not None and not checkpoint and is_user_file(parsed.base) and takes_classes(parsed.base) == "needs":
        parsed = replace(parsed, options={"num_classes": classes, **parsed.options})
    network, weights = _build(parsed)
    source: dict[str, Any] = {"spec": given.text, "weights": weights, "network": parsed.built}
    if is_user_file(parsed.base):
        source["code_sha256"] = code_sha256(parsed.base)
    if given.view_size is not None:
        source["view_size"] = list(given.view_size)
    network = unwrapped(network)
    if not is_exported(network):  # which has no eval(), and is refused with advice when it runs
        with naming_errors(f"{given.name!r} must have an evaluation mode, but its eval() raised"):
            network.eval()
    if config is not None:
        seen = preprocessing_of(network, given.options, config.preprocessing)
    else:
        seen = preprocessing_of(network, parsed.options)
        seen = replace(seen, size=size) if size is not None and "img_size" not in given.options else seen
    if given.view_size is not None:
        seen = replace(seen, size=(seen.size[0], *given.view_size))
    return Subject(given.name, network, seen, source, classes=config.classes if config is not None else ())


def base_of(spec: str) -> str:
    """What builds the network of a model spec: a name, or ``path/file.py:factory``; of a folder, what its record says.

    Raises:
        CkaProbeError: as for `load_subject`.
    """
    return _with_config(ModelSpec.parse(spec))[0].base


def with_class_count(subject: Subject, classes: int, seed: int) -> nn.Module | None:
    """A network like a subject's with another number of classes, all weights but the classifier's its own.

    Args:
        subject: loaded by `load_subject`.
        classes: how many.
        seed: of the classifier.

    Returns:
        The network: the subject's own where it has ``reset_classifier``, a new one of its factory where that takes
        ``num_classes``; None where neither is so.
    """
    network = subject.network
    if hasattr(network, "reset_classifier"):
        reset_classifier(network, classes, seed)
        return network
    spec = str(subject.source.get("network", ""))
    parsed = ModelSpec.parse(spec) if spec else None
    if parsed is None or not is_user_file(parsed.base) or not takes_classes(parsed.base):
        return None
    other = unwrapped(user_network(parsed.base, {**parsed.options, "num_classes": classes}, seed))
    own = network.state_dict()
    same = {name: own[name] for name, value in other.state_dict().items() if _shape(own.get(name)) == value.shape}
    other.load_state_dict(same, strict=False)
    return other.train(network.training)


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _with_config(spec: ModelSpec) -> tuple[ModelSpec, ModelConfig | None, tuple[int, int, int] | None]:
    """A spec with the network and weights of the folder that it names, and what is known of its images.

    Returns:
        The spec to build the network by; the config.json beside the weights; the size of the images, where the record
        of a run alone says it.
    """
    folder = spec.folder
    if folder is not None:
        found = read_folder(folder, spec.weights if spec.seed is None else None)
        network = ModelSpec.parse(found.network)
        weights = spec.weights if spec.seed is not None else str(found.weights)
        arguments = _arguments(network.base, found.config)
        recorded = {key: value for key, value in network.options.items() if key != "num_classes"}
        options = {**arguments, **recorded, **spec.options}
        return replace(spec, base=network.base, options=options, weights=weights), found.config, found.size
    if spec.weights is None or spec.seed is not None:
        return spec, None, None
    config = read_model_config(Path(spec.weights).parent)
    if config is None or not _describes(config, spec.base):
        return spec, None, None
    return replace(spec, options={**_arguments(spec.base, config), **spec.options}), config, None


def _arguments(base: str, config: ModelConfig | None) -> Mapping[str, Any]:
    """The arguments of a network of timm's that its config.json records."""
    timms = config is not None and config.architecture == base.partition(".")[0]
    return config.arguments if config is not None and timms else {}


def _describes(config: ModelConfig, base: str) -> bool:
    """Whether a config.json is of this network, as far as can be known; if not, that is reported."""
    if is_user_file(base) or base.startswith(("hf-hub:", "hf_hub:")):
        return True
    own = None if base.startswith("zoo:") else base.partition(".")[0]
    if config.architecture != own:
        warn_once("%s describes %s, not %s, and is ignored.", config.path, config.architecture or "another", base)
    return config.architecture == own


def _build(spec: ModelSpec) -> tuple[nn.Module, str]:
    """The network, and which weights it has."""
    if spec.base.startswith("zoo:"):
        return _zoo(spec)
    return _from_file(spec) if is_user_file(spec.base) else _timm(spec)


def _zoo(spec: ModelSpec) -> tuple[nn.Module, str]:
    name = _check_zoo(spec)
    make = partial(_random_zoo, name, spec.seed or 0)
    if spec.seed is not None:
        return make(spec.options), f"random, seed {spec.seed}"
    if spec.weights is None:
        network = make({})
        return network, load_checkpoint(network, zoo.weights_path(name))
    return loaded_as_built(make, spec.options, Path(spec.weights))


def _random_zoo(name: str, seed: int, options: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return zoo.ZOO[name.removesuffix("-2")](**options)


def _check_zoo(spec: ModelSpec) -> str:
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


def _from_file(spec: ModelSpec) -> tuple[nn.Module, str]:
    seed = spec.seed
    if spec.weights and seed is None:
        make = partial(user_network, spec.base, seed=0)
        return loaded_as_built(make, spec.options, Path(spec.weights), takes_classes(spec.base))
    return user_network(spec.base, spec.options, seed or 0), FROM_FACTORY if seed is None else f"random, seed {seed}"


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
