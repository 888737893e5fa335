"""The loss of OBoW: the student's features predict the bags of words of the teacher's maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.distill.bags.codes import bag_loss
from cka_probe.distill.bags.dynamic_head import DynamicHead
from cka_probe.distill.bags.vocabulary import Vocabulary


class BagPrediction(nn.Module):
    """Vocabularies, a dynamic head for each, and the loss between bags and predictions.

    Args:
        vocabularies: one a level.
        heads: one a level.
    """

    def __init__(self, vocabularies: Sequence[Vocabulary], heads: Sequence[DynamicHead]) -> None:
        super().__init__()
        self.vocabularies: Any = nn.ModuleList(vocabularies)
        self.heads: Any = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        """The mean over levels of KL(bag ‖ prediction), for each kind of crops; then new words join.

        Args:
            features: for each kind of crops (n · k, width), the k crops of an image next to each other.
            maps: of the teacher, a level each, (n, c, h, w).
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            weights = [
                head(vocabulary.words.clone()) for head, vocabulary in zip(self.heads, self.vocabularies, strict=True)
            ]
            bags = [vocabulary(level) for vocabulary, level in zip(self.vocabularies, maps, strict=True)]
            return [torch.stack(self._losses(crops, weights, bags)).mean() for crops in features]

    def _losses(self, features: Tensor, weights: Sequence[Tensor], bags: Sequence[Tensor]) -> list[Tensor]:
        """For each level."""
        return [
            bag_loss(head.logits(features, own), target.repeat_interleave(len(features) // len(target), 0))
            for head, own, target in zip(self.heads, weights, bags, strict=True)
        ]
