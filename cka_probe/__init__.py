"""cka-probe: where two vision networks agree, layer by layer, and what to do about it.

import cka_probe as cp
sim = cp.compare(["zoo:cnn", "zoo:vit"], data="digits")
sim.between("zoo:cnn", "zoo:vit").values
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cka_probe.comparison import compare
    from cka_probe.errors import CkaProbeError
    from cka_probe.hooks import capture
    from cka_probe.measures.linear_cka import linear_cka
    from cka_probe.measures.rbf_cka import rbf_cka
    from cka_probe.models import Preprocessing, Subject, load_subject
    from cka_probe.plots import plot_atlas, plot_difference, plot_heatmap, plot_pairs, plot_profile
    from cka_probe.similarity import Layer, Similarity

_HOMES = {
    "CkaProbeError": "errors",
    "Layer": "similarity",
    "Preprocessing": "models",
    "Similarity": "similarity",
    "Subject": "models",
    "capture": "hooks",
    "compare": "comparison",
    "linear_cka": "measures.linear_cka",
    "load_subject": "models",
    "plot_atlas": "plots",
    "plot_difference": "plots",
    "plot_heatmap": "plots",
    "plot_pairs": "plots",
    "plot_profile": "plots",
    "rbf_cka": "measures.rbf_cka",
}

__all__ = [
    "CkaProbeError",
    "Layer",
    "Preprocessing",
    "Similarity",
    "Subject",
    "capture",
    "compare",
    "linear_cka",
    "load_subject",
    "plot_atlas",
    "plot_difference",
    "plot_heatmap",
    "plot_pairs",
    "plot_profile",
    "rbf_cka",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: torch and matplotlib take seconds, and ``--help`` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cka_probe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"cka_probe.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
