"""A measure that is started without a comparison around it."""

from __future__ import annotations

from collections.abc import Sequence

from cka_probe.estimation.estimates import VALUES_ONLY, Requests
from cka_probe.estimation.feature_store import FeatureStore, Scratch
from cka_probe.estimation.measure import Accumulator, Setup
from cka_probe.measures.catalogue import parse_measure


def start(spec: str, labels: Sequence[str], asked: Requests = VALUES_ONLY, *, seed: int = 0) -> Accumulator:
    """The measure of layers with these labels."""
    return parse_measure(spec).start(Setup(labels, labels, FeatureStore(labels, 1000, Scratch()), seed, asked))
