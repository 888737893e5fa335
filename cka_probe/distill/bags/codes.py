"""The arithmetic of OBoW (Gidaris et al. 2021, arXiv 2012.11552): from feature maps to bags of words, and the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_MAP = 5
"""Rows and columns that a map must have: without its outer ring, a 3 × 3 window is left."""

_AT_ONCE = 8  # images, as their codes take as much memory as their distances


def without_ring(maps: Tensor) -> Tensor:
    """Maps (n, c, h, w) without their outer ring of one location, (n, c, h - 2, w - 2)."""
    return maps[:, :, 1:-1, 1:-1]


def squared_distances(maps: Tensor, words: Tensor) -> Tensor:
    """The squared Euclidean distance of each location to each word.

    Args:
        maps: (n, c, h, w) float32.
        words: (k, c) float32.

    Returns:
        (n, k, h · w), at least 0.
    """
    locations = maps.flatten(2)
    distances = torch.matmul(words, locations).mul_(-2)  # of all that is here, the one large tensor
    distances += words.square().sum(1)[None, :, None]
    distances += locations.square().sum(1, keepdim=True)
    return distances.clamp_min_(0)  # round-off of a location that is a word


def bags_of(distances: Tensor, scale: Tensor) -> Tensor:
    """The bag of each image: the maximum over locations of the soft codes, divided by its sum.

    The code of a location is the softmax over words of ``-scale * distance``.

    Args:
        distances: (n, k, locations) of `squared_distances`.
        scale: the inverse temperature δ⁻¹ over the mean smallest distance, a scalar.

    Returns:
        (n, k), each row a distribution over the words.
    """
    bags = torch.cat([torch.softmax(part * -scale, dim=1).amax(2) for part in distances.split(_AT_ONCE)])
    return bags / bags.sum(1, keepdim=True)


def new_words(maps: Tensor, chosen: Tensor) -> Tensor:
    """One vector an image: the mean of the 3 × 3 window at a location.

    Args:
        maps: (n, c, h, w) without their outer ring, 3 × 3 or more.
        chosen: (n,) numbers from 0 below 1, one an image, that select the window.

    Returns:
        (n, c).
    """
    means = F.avg_pool2d(maps, 3, stride=1).flatten(2)
    count = means.shape[2]
    places = (chosen * count).long().clamp_max(count - 1)
    return means.gather(2, places[:, None, None].expand(-1, means.shape[1], 1))[:, :, 0]


def bag_loss(logits: Tensor, bags: Tensor) -> Tensor:
    """The mean over the rows of KL(bag ‖ softmax(logits)), a scalar.

    Args:
        logits: (n, k) predictions.
        bags: (n, k) distributions.
    """
    return F.kl_div(F.log_softmax(logits.float(), dim=1), bags.float(), reduction="batchmean")
