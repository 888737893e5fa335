"""Checkpoints: the state dict in a file, and loading it into a network."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.errors import CheckpointError
from cka_probe.runtime.files import reason
from cka_probe.runtime.folder.checkpoint import require_whole

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 4
_ZIP = b"PK\x03\x04"


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
    problems = misfits(network, state)
    if problems:
        raise CheckpointError(
            f"The checkpoint {path} does not fit {type(network).__name__}: {'; '.join(problems)}. "
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
            f"The checkpoint {path} must hold dense tensors of real numbers, but {len(odd)} are others: "
            f"{listed_names(odd)}"
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
            f"The checkpoint {path} must hold one network of this kind, but holds several, under the prefixes "
            f"{', '.join(map(repr, fitting))}. Save the state dict of one of them."
        )
    if not fitting:
        return state
    (prefix,) = fitting
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ignored = len(state) - len(found)
    rest = f"; its {ignored} other tensors are not used" if ignored else ""
    logger.info("%s holds the weights under the prefix %r%s.", path, prefix, rest)
    return found


def misfits(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
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
    return [f"{what} ({len(keys)}): {listed_names(keys).removesuffix('.')}" for what, keys in problems.items() if keys]


def listed_names(names: list[str]) -> str:
    """The first few names for a message, and how many there are if that is more."""
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN_KEYS + 1 else ""
    return ", ".join(names[: _SHOWN_KEYS + 1]) + more + "."


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
