"""The teacher of OBoW: the moving average of the student's parameters."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

FIRST_MOMENTUM = 0.99


def momentum(done: float) -> float:
    """α of a step: from 0.99 at the first to 1 after the last, by half a cosine.

    Args:
        done: share of the run's updates that are done, from 0 to 1.

    >>> momentum(0), momentum(0.5), momentum(1)
    (0.99, 0.995, 1.0)
    """
    return 1 - (1 - FIRST_MOMENTUM) * (1 + cos(pi * done)) / 2


class MovingAverage(nn.Module):
    """A copy of the student that follows it.

    In training mode its batch norms normalise by the batch and keep statistics of their own; dropout and stochastic
    depth stay off (ours: the paper's networks have none).

    Args:
        network: of the student's architecture; it gets no gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, alpha: float) -> None:
        """θ ← α θ + (1 − α) θ_student, for the parameters alone."""
        for own, other in zip(self.network.parameters(), student.parameters(), strict=True):
            own.mul_(alpha).add_(other.detach(), alpha=1 - alpha)

    def train(self, mode: bool = True) -> MovingAverage:
        """As `nn.Module.train`; of the network the batch norms alone change."""
        self.training = mode
        for module in self.network.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        return self
