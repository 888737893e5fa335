"""A run over images: what to do, which processes do it, and whom to notify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.activations.layers import parse_patterns
from cka_probe.probing.options import Execution, FeatureOptions, Images
from cka_probe.runtime.world import World

Progress = Callable[[int, int], None]
Preview = Callable[[Mapping[str, NDArray[np.uint8]]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of networks over images.

    Attributes:
        images: which.
        features: of which layers, and what of them.
        running: where and how.
        world: the processes that share the batches, each taking every so many-th.
        merge_often: bring what the processes have together after every round of batches, as it is large.
        progress: called after each batch with the images done and the images in all.
        before_network: called each time before a network runs on a batch.
        preview: called once, with the first few images as each model sees them: its name -> (k, h, w, c) uint8.
    """

    images: Images
    features: FeatureOptions
    running: Execution
    world: World
    merge_often: bool = False
    progress: Progress | None = None
    before_network: Callable[[], None] | None = None
    preview: Preview | None = None

    @cached_property
    def patterns(self) -> tuple[str, ...]:
        """Of layers, as `cka_probe.activations.layers.select` takes them."""
        return tuple(parse_patterns(self.features.layers))

    @property
    def where(self) -> torch.device:
        """The networks run."""
        return self.world.device
