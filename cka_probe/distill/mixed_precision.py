"""Mixed precision: the type in which the networks of a training or an evaluation run."""

from __future__ import annotations

import torch

from cka_probe.distill.options import MixedPrecision
from cka_probe.errors import SpecError


def autocast(options: MixedPrecision, device: torch.device) -> torch.autocast:
    """Within the block, networks on the device run in the type that the options name, if they name one."""
    kind = torch.float16 if options.fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype=kind, enabled=options.fp16 or options.bf16)


def check_device(options: MixedPrecision, device: torch.device) -> None:
    """Raise a SpecError where the device does not run networks in the type that the options name."""
    if options.fp16 and device.type != "cuda":
        raise SpecError(f"--fp16 needs a CUDA device, but the device is {device}. Use --bf16, or neither of them.")
