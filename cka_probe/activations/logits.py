"""The logits in what a network puts out: the output itself, or the first of several."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from cka_probe.activations.hooks import tensors_in
from cka_probe.errors import NetworkError

logger = logging.getLogger(__name__)

_TOLD: WeakSet[nn.Module] = WeakSet()
"""Networks whose further outputs were logged."""


def logits_in(output: Any) -> Any:
    """What should be the logits: of a mapping its "logits", of a tuple or list the first, else the output itself.

    >>> logits_in(("logits", "auxiliary")), logits_in({"loss": None, "logits": "these"}), logits_in("alone")
    ('logits', 'these', 'alone')
    """
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if isinstance(output, (tuple, list)):
        return output[0] if output else output
    return getattr(output, "logits", output)  # a dataclass


def logits_of(output: Any, images: int, name: str, place: str, classes: int | None = None) -> Tensor:
    """The logits in what a network put out.

    Args:
        output: of its forward pass.
        images: how many it got.
        name: of the network, for messages.
        place: for messages: ``"in epoch 2, step 5 of 11"``.
        classes: that the logits must have; any number where None.

    Returns:
        (images, classes).

    Raises:
        NetworkError: it holds no such logits.
    """
    logits = logits_in(output)
    fits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == images
    if fits and classes in (None, logits.shape[1]):
        return logits  # type: ignore[no-any-return]  # a Tensor
    got = ", ".join(str(tuple(tensor.shape)) for _, tensor in tensors_in(output))
    wanted = f"({images}, {'classes' if classes is None else classes})"
    first = "" if isinstance(output, Tensor) else " first, or under the key 'logits'"
    raise NetworkError(
        f"{name!r} must put out logits {wanted} for {images} images{first}, but {place} put out "
        f"{'shape ' if isinstance(output, Tensor) else f'{type(output).__name__} of shapes ' if got else ''}"
        f"{got or type(output).__name__}."
    )


def log_further_outputs(network: nn.Module, output: Any, name: str) -> None:
    """Log, once a network, that what it puts out beside its logits is not used."""
    if isinstance(output, Tensor) or network in _TOLD:
        return
    logits = logits_in(output)
    further = [path for path, tensor in tensors_in(output) if tensor is not logits]
    if further:
        _TOLD.add(network)
        logger.info("%s puts out more than its logits (%s), which is not used.", name, ", ".join(further))
