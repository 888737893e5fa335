"""Networks and their weights: from timm and its Hub, from checkpoints, from a user's own file."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cka_probe.activations.modules import unwrapped
from cka_probe.errors import CheckpointError, CkaProbeError, HubError, SpecError
from cka_probe.runtime.files import reason
from cka_probe.runtime.folder.checkpoint import require_whole
from cka_probe.runtime.randomness import seed_everything
from cka_probe.runtime.user_code import describe_error, naming_errors
from cka_probe.runtime.user_files import user_callable

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 4
_ZIP = b"PK\x03\x04"
_HUB_TIMEOUT_S = 5.0
_ANSWERED: set[str] = set()

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
    with _fetching(f"The pretrained weights of {name!r}", advice):
        network = _create(name, options, pretrained=True)
    config: Any = network.pretrained_cfg
    return network, f"{config['architecture']}.{config['tag']}" if config.get("tag") else name


def random_timm(name: str, options: Mapping[str, Any], seed: int) -> nn.Module:
    """A timm model with random weights from ``seed``; the global random state stays as it was."""
    known = known_timm_name(name)
    advice = "or name an architecture of timm's"
    with torch.random.fork_rng(devices=[]), nullcontext() if known else _fetching(f"The model {name!r}", advice):
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
    if _misfits(network, state):
        # Weights published by a model's own authors: timm's module of the model knows how to rename them.
        convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        try:
            converted = convert(dict(state), network) if convert else state
        except (LookupError, AttributeError, RuntimeError, ValueError, TypeError):
            converted = state  # of another model altogether: the keys will show it
        state = state if _misfits(network, converted) else converted
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


def load_checkpoint(network: nn.Module, path: Path, state: Mapping[str, Tensor] | None = None) -> str:
    """Load the weights of a file into a network, every one of them.

    Args:
        network: filled in place.
        path: of the file.
        state: its content, where it was read already.

    Returns:
        What was loaded: the file's name and the start of its SHA-256.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; the message names the keys.
    """
    state = without_prefix(read_checkpoint(path), network, path) if state is None else state
    misfits = _misfits(network, state)
    if misfits:
        raise CheckpointError(
            f"The checkpoint {path} does not fit {type(network).__name__}: {'; '.join(misfits)}. "
            "Name the model that it was saved from, with the same keyword arguments."
        )
    try:
        network.load_state_dict(dict(state))
    except Exception as error:  # a user's network may load its weights in a way of its own
        raise CheckpointError(
            f"The checkpoint {path} could not be loaded into {type(network).__name__}: {reason(error)}"
        ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{path.name}, sha256 {digest[:16]}"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: ``.safetensors``, or any file that `torch.save` wrote.

    It may be plain, or under ``state_dict``, ``model``, ``state_dict_ema`` or another single key, with or without
    the ``module.`` and ``_orig_mod.`` of wrappers. Averaged (EMA) weights are preferred where both are there.

    Raises:
        CheckpointError: there is no such file, it holds no weights, or it needs arbitrary unpickling.
    """
    from timm.models import clean_state_dict, load_state_dict

    if not os.path.isfile(path):
        there = "it is a folder" if os.path.isdir(path) else "it is something else"
        raise CheckpointError(
            f"The checkpoint {path} must be a file, but {there if os.path.exists(path) else 'there is none'}."
        )
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError("it is a pointer of Git LFS, not the file itself: run 'git lfs pull'")
        if start.startswith(_ZIP):
            require_whole(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles and of sparse tensors, which are refused below
            state: Any = load_state_dict(str(path))
    except (AttributeError, TypeError) as error:  # what is asked for parts that only a state dict has
        raise CheckpointError(f"The checkpoint {path} must hold a state dict of tensors, but does not.") from error
    except Exception as error:  # of a damaged or foreign file, the readers of zip and pickle raise anything
        text = f"{error} {error.__cause__}"
        if "Unsupported operand" in text:  # which timm takes for pickled objects
            raise CheckpointError(
                f"The checkpoint {path} cannot be read: it is no file that torch.save() wrote, or damaged."
            ) from error
        refused = "pickle globals" in text or "weights_only" in text
        why = "needs arbitrary unpickling, which can run any code" if refused else "cannot be read"
        # PyTorch's own advice on the first is to run that code.
        detail = ". Save its state_dict() alone." if refused else f": {reason(error).rstrip('.')}."
        raise CheckpointError(f"The checkpoint {path} {why}{detail}") from error
    if isinstance(state, Mapping) and not _holds_tensors(state):
        nested = [value for value in state.values() if isinstance(value, Mapping) and _holds_tensors(value)]
        state = clean_state_dict(nested[0]) if len(nested) == 1 else state
    if not (isinstance(state, Mapping) and _holds_tensors(state)):
        held = ", ".join(map(str, list(state)[:_SHOWN_KEYS])) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"The checkpoint {path} must hold a state dict of tensors, but holds: {held}.")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    odd = [f"{name} ({kind})" for name, kind in ((name, _oddness(value)) for name, value in tensors.items()) if kind]
    if odd:
        raise CheckpointError(
            f"The checkpoint {path} must hold dense tensors of real numbers, but {len(odd)} are others: {_listed(odd)}"
        )
    return tensors


def without_prefix(state: Mapping[str, Tensor], network: nn.Module, path: Path) -> Mapping[str, Tensor]:
    """The weights of a network in a state dict that has them under a prefix, as Lightning does: ``model.conv1.weight``.

    Args:
        state: of a checkpoint.
        network: whose keys count; its values do not.
        path: of the checkpoint, for messages.

    Returns:
        The tensors under the prefix, without it; ``state`` itself where the network's keys are not all there under one.

    Raises:
        CheckpointError: several prefixes fit.
    """
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    if not own or all(name in state for name in own):
        return state
    ends = [name.removesuffix(own[0]) for name in state if name.endswith(f".{own[0]}")]
    fitting = [prefix for prefix in ends if all(prefix + name in state for name in own)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"The checkpoint {path} holds several networks of this kind, under the prefixes {', '.join(fitting)}. "
            "Save the state dict of one of them."
        )
    if not fitting:
        return state
    (prefix,) = fitting
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ignored = len(state) - len(found)
    rest = f"; its {ignored} other tensors are not used" if ignored else ""
    logger.info("%s holds the weights under the prefix %r%s.", path, prefix, rest)
    return found


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
            f"timm could not make {name!r} with {_shown(options)}: {type(error).__name__}: {_first_line(error)}"
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
        hint = f"Close names: {_listed(close)}" if close else "See timm.list_models()."
        raise SpecError(
            f"timm has no model named {name!r}. {hint} A network of your own is file.py:factory, a bundled one zoo:cnn."
        )
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and name not in tagged:
        raise SpecError(f"timm has no weights {tag!r} for {architecture!r}. It has: {_listed(tagged)}")
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


def _misfits(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from a network: missing, unexpected and wrongly shaped keys, a phrase each."""
    own = network.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = {
        "it lacks": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "it has unknown keys": [name for name in state if name not in own],
        "shapes differ": shapes,
    }
    return [f"{what} ({len(keys)}): {_listed(keys).removesuffix('.')}" for what, keys in problems.items() if keys]


def _oddness(tensor: Tensor) -> str:
    """What keeps a tensor from being copied into a weight as it is, or nothing."""
    kinds = {
        "without values, on the meta device": tensor.is_meta,
        "nested": tensor.is_nested,
        "sparse": tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


@contextmanager
def _fetching(what: str, advice: str) -> Iterator[None]:
    """Within the block, an error of the Hub becomes a `HubError`."""
    try:
        with _offline_unless_reachable():
            yield
    except OSError as error:  # those of the Hub's client and of urllib are all OSErrors
        raise HubError(
            f"{what} could not be fetched, nor found in the local cache: {_first_line(error)} Connect to the Hub "
            f"(or set HF_ENDPOINT to a mirror), {advice}."
        ) from error


@contextmanager
def _offline_unless_reachable() -> Iterator[None]:
    """Within the block, the Hub's client looks into its cache alone where the Hub does not answer.

    Left to itself it tries each file six times, for most of a minute, before it does so.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _reachable(endpoint: str) -> bool:
    """Whether the Hub answers; asked again only while it does not."""
    from huggingface_hub.utils import get_session

    if endpoint in _ANSWERED:
        return True
    try:
        get_session().head(endpoint, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # whichever HTTP library this version of the client uses
        logger.info("The Hub at %s does not answer (%s): only cached weights can be used.", endpoint, error)
        return False
    _ANSWERED.add(endpoint)
    return True


def _first_line(error: BaseException) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else f"{line}."


def _listed(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN_KEYS + 1 else ""
    return ", ".join(names[: _SHOWN_KEYS + 1]) + more + "."


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no arguments"
