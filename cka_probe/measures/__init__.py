"""The measures of similarity: one a file, and the table of those that `compare` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cka_probe.features import Features
from cka_probe.measures import linear_cka, rbf_cka
from cka_probe.measures.streaming import Estimates


class Streaming(Protocol):
    """A measure that sees one batch at a time."""

    def prepare(self, layer: int, features: Features) -> None: ...

    def update(self) -> None: ...

    def compute(self) -> Estimates: ...


MEASURES: dict[str, Callable[..., Streaming]] = {
    "cka": linear_cka.streaming,
    "cka-biased": linear_cka.biased,
    "cka-rbf": rbf_cka.streaming,
}
"""By name: a factory of (labels, debiased=, seed=, threshold=, median=)."""
