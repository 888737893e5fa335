"""OBoW's step in NumPy and float64, written from the paper location by location and word by word."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def codes_of(location: Array, words: Array, scale: float) -> Array:
    """The soft code of a location, (k,)."""
    logits = np.array([-scale * float(((location - word) ** 2).sum()) for word in words])
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


class Queue:
    """Words, the mean smallest distance, and where the next words go."""

    def __init__(self, words: Array, sharpness: float) -> None:
        self.words, self.sharpness, self.mean, self.first = words.copy(), sharpness, 0.5, 0

    def step(self, maps: Array, places: list[int]) -> Array:
        """The bags (n, k) of maps (n, c, h, w); ``places`` are the 3 x 3 windows that become words, row by row."""
        inner = maps[:, :, 1:-1, 1:-1]
        n, _, h, w = inner.shape
        smallest = [
            min(((inner[i, :, y, x] - word) ** 2).sum() for word in self.words)
            for i in range(n)
            for y in range(h)
            for x in range(w)
        ]
        self.mean = 0.99 * self.mean + 0.01 * float(np.mean(smallest))
        bags = []
        for i in range(n):
            codes = [
                codes_of(inner[i, :, y, x], self.words, self.sharpness / self.mean) for y in range(h) for x in range(w)
            ]
            bag = np.max(codes, axis=0)
            bags.append(bag / bag.sum())
        for i in range(n):
            y, x = divmod(places[i], w - 2)
            self.words[self.first] = inner[i, :, y : y + 3, x : x + 3].mean((1, 2))
            self.first = (self.first + 1) % len(self.words)
        return np.array(bags)


def head_weights(words: Array, first: Array, gain: Array, shift: Array, second: Array, bias: Array) -> Array:
    """The weights (k, width) that the dynamic head makes of words (k, c); a word of zeros stays one."""
    hidden = (words / np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-12)) @ first.T
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * gain + shift
    weights = np.maximum(hidden, 0) @ second.T + bias
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def divergence(bag: Array, logits: Array) -> float:
    """KL(bag ‖ softmax(logits))."""
    log_q = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    return float(sum(p * (np.log(p) - q) for p, q in zip(bag, log_q, strict=True) if p > 0))
