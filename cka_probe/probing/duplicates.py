"""Images that are exact copies of others, found by a hash of the pixels as they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cka_probe.runtime.world import World

_SHOWN = 3


class Duplicates:
    """The hashes of the images of a run, batch by batch; merged, saved and taken up again as the sums of a measure."""

    def __init__(self) -> None:
        self._batches: dict[int, Tensor] = {}

    def note(self, first: int, digests: Tensor) -> None:
        """Keep the (n,) int64 hashes of a batch, by the number of its first example; once more, it changes nothing."""
        self._batches[first] = digests.clone()  # those of a GPU's run lie in pinned memory

    def settle(self, world: World) -> None:
        """Nothing is decided by the first batch."""

    def merge(self, world: World) -> None:
        """Bring what all processes have to rank 0."""
        for batches in world.gathered({} if world.writes else self._batches):
            self._batches.update(batches)
        if not world.writes:
            self._batches.clear()

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs to go on from here."""
        return {"batches": dict(self._batches)}

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Go on from what `state` gave."""
        self._batches = dict(state["batches"])

    def record(self, identity: Callable[[int], str]) -> dict[str, Any]:
        """What the record says of copies; nothing where there are none.

        Args:
            identity: of an example, by its number in the order of the run.

        Returns:
            ``duplicates``: how many images are copies of an earlier one (``images``), and up to three such pairs of
            names (``pairs``), the earlier one first.
        """
        earlier: dict[int, int] = {}
        pairs = [
            (earlier[digest], first + offset)
            for first, digests in sorted(self._batches.items())
            for offset, digest in enumerate(digests.tolist())
            if earlier.setdefault(digest, first + offset) != first + offset
        ]
        if not pairs:
            return {}
        shown = [[identity(one), identity(other)] for one, other in pairs[:_SHOWN]]
        return {"duplicates": {"images": len(pairs), "pairs": shown}}
