"""From the words of a vocabulary to a classifier of them, rebuilt for each batch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DynamicHead(nn.Module):
    """The predictor of OBoW: words -> weights of a linear classifier, with which the student's features are scored.

    Words are L2-normalised, then linear → batch norm over the words → ReLU → linear → L2-normalised.

    Args:
        channels: of the words.
        width: of the student's features; the hidden layer has twice as many.
        kappa: fixed scale of the logits.
    """

    def __init__(self, channels: int, width: int, *, kappa: float) -> None:
        super().__init__()
        self.kappa = kappa
        self.layers = nn.Sequential(
            nn.Linear(channels, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, words: Tensor) -> Tensor:
        """The weights (k, width) of words (k, channels), each row of norm 1."""
        return F.normalize(self.layers(F.normalize(words, dim=1)).float(), dim=1)

    def logits(self, features: Tensor, weights: Tensor) -> Tensor:
        """κ · features · weightsᵀ, (n, k).

        Args:
            features: (n, width) of the student, not normalised.
            weights: of `forward`.
        """
        return self.kappa * F.linear(features.float(), weights)
