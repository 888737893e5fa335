"""Sums of the parts of the loss over an epoch, kept on the device: reading them waits for it, so it is done seldom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cka_probe.runtime.world import World


class LossSums:
    """Sums of named scalars, how many were added, their last finite values, and which was not finite first."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._total = torch.zeros(0)
        self._broken = torch.zeros(0)
        self._last = torch.zeros(0)
        self._count = 0

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> LossSums:
        """The sums that `state` gave, on a device."""
        sums = cls()
        sums._names, sums._count = tuple(state["names"]), state["count"]
        sums._total, sums._broken = state["total"].to(device), state["broken"].to(device)
        sums._last = torch.full_like(sums._broken, torch.nan)
        return sums

    def state(self) -> dict[str, Any]:
        """What `of` needs."""
        return {"names": list(self._names), "count": self._count, "total": self._total, "broken": self._broken}

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of a step; they are the same parts in every step."""
        values = torch.stack(list(parts.values())).detach().float()
        if not self._names:
            self._names = tuple(parts)
            self._total, self._broken = torch.zeros_like(values, dtype=torch.float64), torch.zeros_like(values)
            self._last = torch.full_like(values, torch.nan)
        self._total = self._total + values
        # After the first broken step the weights are broken too, and with them every part.
        self._broken = torch.where(self._broken.any(), self._broken, (~values.isfinite()).float())
        self._last = torch.where(self._broken.any(), self._last, values)
        self._count += 1

    def broken_parts(self, world: World) -> list[str]:
        """The names of the parts that were not finite when the first was not, on any process."""
        broken = world.sum(self._broken).tolist()
        return [name for name, count in zip(self._names, broken, strict=True) if count]

    def last_finite(self) -> dict[str, float]:
        """Each part in the last step on this process before one was not finite; NaN where there was none."""
        return dict(zip(self._names, self._last.tolist(), strict=True))

    def means(self, world: World) -> dict[str, float]:
        """The mean of each part, over all processes."""
        total = world.sum(self._total) / (world.size * max(self._count, 1))
        return dict(zip(self._names, total.tolist(), strict=True))

    def own_means(self) -> dict[str, float]:
        """The mean of each part on this process."""
        return dict(zip(self._names, (self._total / max(self._count, 1)).tolist(), strict=True))
