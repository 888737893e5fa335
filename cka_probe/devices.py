"""Which device the networks run on."""

from __future__ import annotations

import torch

from cka_probe.errors import SpecError


def device_named(name: str) -> torch.device:
    """The device of that name, which must be there; ``"auto"`` is CUDA where there is one.

    Raises:
        SpecError: it is not there, or has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise SpecError("The device 'mps' has no float64, which the sums need. Use --device cpu.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise SpecError(f"The device {name!r} must be there, but is not. There are: {', '.join(there)}.") from error
    return device


def device_name(device: torch.device) -> str:
    """What a record calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
