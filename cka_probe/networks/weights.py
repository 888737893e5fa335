"""Networks and their weights: from timm and its Hub, from checkpoints, from a user's own file."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cka_probe.activations.modules import unwrapped
from cka_probe.errors import CkaProbeError, SpecError
from cka_probe.networks.checkpoints import listed_names, load_checkpoint, misfits, read_checkpoint, without_prefix
from cka_probe.networks.hub import fetching, first_line
from cka_probe.runtime.randomness import seed_everything
from cka_probe.runtime.user_code import describe_error, naming_errors
from cka_probe.runtime.user_files import user_callable

ANY_CLASSES = 2
"""For a factory that needs a number of classes before the right one is known."""


def pretrained_timm(name: str, options: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """A timm model with its pretrained weights, and the tag of the weights.

    Raises:
        SpecError: timm does not know the name, or has no weights for it.
        HubError: the weights cannot be fetched.
    """
    import timm

    known = known_timm_name(name)
    if known and not (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).has_weights:
        raise SpecError(
            f"timm has no pretrained weights for {name!r}. Use {name}@random, or {name}@CHECKPOINT with a file."
        )
    advice = f"use {name}@CHECKPOINT with a file of weights, or {name}@random for random ones"
    with fetching(f"The pretrained weights of {name!r}", advice):
        network = _create(name, options, pretrained=True)
    config: Any = network.pretrained_cfg
    return network, f"{config['architecture']}.{config['tag']}" if config.get("tag") else name


def random_timm(name: str, options: Mapping[str, Any], seed: int) -> nn.Module:
    """A timm model with random weights from ``seed``; the global random state stays as it was."""
    known = known_timm_name(name)
    advice = "or name an architecture of timm's"
    with torch.random.fork_rng(devices=[]), nullcontext() if known else fetching(f"The model {name!r}", advice):
        torch.manual_seed(seed)
        return _create(name, options)


def timm_with_checkpoint(name: str, options: Mapping[str, Any], path: Path) -> tuple[nn.Module, str]:
    """A timm model with the weights of a file, its number of classes read from them; and the file's hash.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
    """
    import timm

    known_timm_name(name)
    config = timm.models.get_pretrained_cfg(name)

    def built(state: Mapping[str, Tensor]) -> nn.Module:
        classes = _classes_in(state, config.classifier if config else None)
        return random_timm(name, {"num_classes": classes, **options}, seed=0)

    whole = read_checkpoint(path)
    network = built(whole)
    state = without_prefix(whole, network, path)
    if state is not whole:
        network = built(state)
    if misfits(network, state):
        # Weights published by a model's own authors: timm's module of the model knows how to rename them.
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        try:
            converted = convert(dict(state), network) if convert else state
        except (LookupError, AttributeError, RuntimeError, ValueError, TypeError):
            converted = state  # of another model altogether: the keys will show it
        state = state if misfits(network, converted) else converted
    return network, load_checkpoint(network, path, state)


def loaded_as_built(
    make: Callable[[Mapping[str, Any]], nn.Module], options: Mapping[str, Any], path: Path, takes: str = "takes"
) -> tuple[nn.Module, str]:
    """A network with the weights of a file, its number of classes read from them where ``options`` does not say it.

    Args:
        make: from keyword arguments to a network.
        options: the keyword arguments.
        path: of the file.
        takes: of `takes_classes`: whether ``make`` takes ``num_classes``.

    Raises:
        CheckpointError: the file cannot be read, or does not fit.
    """
    whole = read_checkpoint(path)
    first = {"num_classes": ANY_CLASSES} if takes == "needs" else {}
    network = unwrapped(make({**first, **options}))
    state = without_prefix(whole, network, path)
    classes = _other_classes(network, state) if "num_classes" not in options else None
    if classes is not None and takes:
        network = unwrapped(make({**options, "num_classes": classes}))
    elif classes is not None and hasattr(network, "reset_classifier"):
        reset_classifier(network, classes)
    return network, load_checkpoint(network, path, state)


def takes_classes(base: str) -> Literal["needs", "takes", ""]:
    """Whether the factory of ``path/file.py:factory`` takes ``num_classes``, or needs it.

    Raises:
        SpecError: there is no such file or factory.
    """
    with user_callable(base, "factory") as factory:
        try:
            found = inspect.signature(factory).parameters.get("num_classes")
        except (TypeError, ValueError):
            return ""
    if found is None or found.kind in (found.POSITIONAL_ONLY, found.VAR_POSITIONAL, found.VAR_KEYWORD):
        return ""
    return "needs" if found.default is found.empty else "takes"


def reset_classifier(network: nn.Module, classes: int, seed: int = 0) -> None:
    """Give a network a new classifier by its own ``reset_classifier``; the global random state stays as it was.

    Raises:
        NetworkError: it raises.
    """
    reset: Any = network.reset_classifier
    with torch.random.fork_rng(devices=[]), naming_errors(f"{type(network).__name__}.reset_classifier({classes})"):
        torch.manual_seed(seed)
        reset(classes)


def user_network(base: str, options: Mapping[str, Any], seed: int) -> nn.Module:
    """What the factory of ``path/file.py:factory`` returns, called with ``options`` under ``seed``.

    Raises:
        SpecError: there is no such file or factory, or it returns no network.
    """
    with user_callable(base, "factory") as factory:
        try:
            inspect.signature(factory).bind(**options)
        except (TypeError, ValueError) as error:
            raise SpecError(f"{base} could not be called with {_shown(options)}: {error}") from error
        seed_everything(seed)
        torch.manual_seed(seed)
        try:
            network = factory(**options)
        except (KeyboardInterrupt, CkaProbeError):
            raise
        except BaseException as error:  # a user's code may raise anything, SystemExit too
            raise SpecError(f"{base} must return a network, but raised {describe_error(error)}") from error
    if not isinstance(network, nn.Module):
        hint = " Return the network that it was exported from." if type(network).__name__ == "ExportedProgram" else ""
        raise SpecError(f"{base} must return a torch.nn.Module, but returned {type(network).__name__}.{hint}")
    return network


def _create(name: str, options: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    import timm

    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # options go to the network's own code, which may raise anything
        if isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):
            raise
        raise SpecError(
            f"timm could not make {name!r} with {_shown(options)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return network


def known_timm_name(name: str) -> bool:
    """Whether timm can look ``name`` up here; False for a name on the Hub. Raises a SpecError where neither."""
    import timm

    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return False
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        hint = f"Close names: {listed_names(close)}" if close else "See timm.list_models()."
        raise SpecError(
            f"timm has no model named {name!r}. {hint} A network of your own is file.py:factory, a bundled one zoo:cnn."
        )
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and name not in tagged:
        raise SpecError(f"timm has no weights {tag!r} for {architecture!r}. It has: {listed_names(tagged)}")
    return True


def _classes_in(state: Mapping[str, Tensor], classifier: str | tuple[str, ...] | None) -> int:
    """The rows of the classifier in a state dict; 0 where it has none, as a headless network."""
    own = (classifier,) if isinstance(classifier, str) else classifier or ()
    for name in (*own, "head", "head.fc", "fc", "classifier"):
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim:
            return weight.shape[0]
    return 0


def _other_classes(network: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes in a state dict that differs from a network in that alone; None where it does not.

    All tensors of another shape have then another first dimension alone, and the same one.
    """
    own = network.state_dict()
    pairs = [(own[name].shape, value.shape) for name, value in state.items() if name in own]
    apart = [(old, new) for old, new in pairs if old != new]
    alike = all(len(old) == len(new) > 0 and old[1:] == new[1:] for old, new in apart)
    counts = {(old[0], new[0]) for old, new in apart} if alike else set()
    return counts.pop()[1] if len(counts) == 1 else None


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no arguments"
