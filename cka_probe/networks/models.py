"""A model spec -> a network, its name and its preprocessing."""

from __future__ import annotations

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
from cka_probe.networks.folders import read_folder
from cka_probe.networks.specs import ModelSpec, check_zoo
from cka_probe.networks.weights import (
    loaded_as_built,
    pretrained_timm,
    random_timm,
    reset_classifier,
    takes_classes,
    timm_with_checkpoint,
    user_network,
)
from cka_probe.runtime.provenance import FROM_FACTORY
from cka_probe.runtime.user_code import naming_errors
from cka_probe.runtime.user_files import code_sha256, is_user_file


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


def load_subject(spec: str, *, classes: int | None = None) -> Subject:
    """The subject that a model spec names, its network in evaluation mode on the CPU.

    A config.json of timm's beside the weights says how the network sees images, where the spec does not.

    Args:
        spec: one of the forms at the top of `cka_probe.networks.specs`.
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
    name = check_zoo(spec)
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
