"""A vocabulary of visual words that is made while the teacher runs: a queue of its local features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cka_probe.distill.bags.codes import bags_of, new_words, squared_distances, without_ring
from cka_probe.distill.training.gathering import gathered, position
from cka_probe.errors import SpecError

DECAY, START = 0.99, 0.5
"""Of the moving average of the smallest distances: its decay, and its value before the first batch."""


class Vocabulary(nn.Module):
    """The words of one level, and the bags of the teacher's maps.

    Its state is in buffers and in `get_extra_state`, so that checkpoints keep it. It is the same on all processes:
    words and distances are gathered, and which locations become words follows from the seed, the batch and the place
    in it.

    Args:
        words: how many, K; a multiple of the images of a batch on all processes.
        channels: of the maps.
        sharpness: δ⁻¹, the inverse temperature of the codes in units of the mean smallest distance.
        seed: of the first words and of the locations.

    Attributes:
        words: (k, c); half of the entries of the first words are 0 in expectation.
        mean_distance: moving average of the smallest squared distance of a location to a word.
        pointer: where the next words are written.
        batches: so far.
    """

    words: Tensor
    mean_distance: Tensor

    def __init__(self, words: int, channels: int, *, sharpness: float, seed: int) -> None:
        super().__init__()
        self._sharpness, self._seed = sharpness, seed
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("words", torch.randn(words, channels, generator=generator).clamp_(min=0))
        self.register_buffer("mean_distance", torch.tensor(START))
        self.pointer = self.batches = 0

    @torch.no_grad()
    def forward(self, maps: Tensor) -> Tensor:
        """The bags (n, k) of the teacher's maps by the words so far; in training, the maps' words then join.

        Args:
            maps: (n, c, h, w), 5 × 5 or more.

        Raises:
            SpecError: the words are no multiple of the images of a batch on all processes.
        """
        with torch.autocast(maps.device.type, enabled=False):
            inner = without_ring(maps.float())
            distances = squared_distances(inner, self.words)
            if self.training:
                smallest = gathered(distances.amin(1).mean()[None]).mean()
                self.mean_distance.mul_(DECAY).add_((1 - DECAY) * smallest)
            bags = bags_of(distances, self._sharpness / self.mean_distance)
            if self.training:
                self._add(new_words(inner, self._places(inner)))
        return bags

    def get_extra_state(self) -> dict[str, int]:
        """Where the queue is; PyTorch puts it into the state beside the buffers."""
        return {"pointer": self.pointer, "batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Put back what `get_extra_state` gave."""
        self.pointer, self.batches = state["pointer"], state["batches"]

    def _places(self, maps: Tensor) -> Tensor:
        """A number from 0 below 1 for each image of this process."""
        first, count = position()[0] * len(maps), len(maps) * position()[1]
        key = np.random.SeedSequence((self._seed, self.batches)).generate_state(1, np.uint64)
        generator = torch.Generator(maps.device).manual_seed(int(key[0]))
        drawn = torch.rand(count, generator=generator, device=maps.device, dtype=torch.float64)
        return drawn[first : first + len(maps)]

    def _add(self, words: Tensor) -> None:
        """Write the new words of all processes over the oldest ones."""
        words = gathered(words)
        if len(self.words) % len(words):
            raise SpecError(
                f"--words must be a multiple of the {len(words)} images of a step on all processes, but is "
                f"{len(self.words)}. Give {len(words) * max(len(self.words) // len(words), 1)}."
            )
        self.words[self.pointer : self.pointer + len(words)] = words
        self.pointer = (self.pointer + len(words)) % len(self.words)
        self.batches += 1
