"""cka-probe: where two vision networks agree, layer by layer, and what to do about it.

import cka_probe as cp
sim = cp.compare(["zoo:cnn", "zoo:vit"], data="digits")
sim.between("zoo:cnn", "zoo:vit").values
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cka_probe.activations.hooks import capture
    from cka_probe.distill.evaluation.accuracy import evaluate
    from cka_probe.distill.from_python import distill
    from cka_probe.distill.methods.cc import CC
    from cka_probe.distill.methods.crd import CRD
    from cka_probe.distill.methods.dist import DIST
    from cka_probe.distill.methods.dkd import DKD
    from cka_probe.distill.methods.fbt import FBT
    from cka_probe.distill.methods.fitnet import FitNet
    from cka_probe.distill.methods.kd import KD
    from cka_probe.distill.methods.none import Scratch
    from cka_probe.distill.methods.ofa import OFA
    from cka_probe.distill.methods.rkd import RKD
    from cka_probe.distill.methods.rsd import RSD
    from cka_probe.distill.methods.visual_words.obow import OBoW
    from cka_probe.distill.methods.visual_words.words import Words
    from cka_probe.errors import CkaProbeError
    from cka_probe.images.preprocessing import Preprocessing
    from cka_probe.measures.cca import PWCCA, SVCCA, MeanCCA, mean_cca, pwcca, svcca
    from cka_probe.measures.energy import EnergyDistance, energy_distance
    from cka_probe.measures.knn import MutualKNN, mutual_knn
    from cka_probe.measures.linear_cka import LinearCKA, linear_cka
    from cka_probe.measures.mantel import Mantel, mantel
    from cka_probe.measures.mmd import MMD, mmd
    from cka_probe.measures.procrustes import Procrustes, procrustes, procrustes_angle
    from cka_probe.measures.rbf_cka import RbfCKA, rbf_cka
    from cka_probe.measures.rsa import RSA, rsa
    from cka_probe.measures.wasserstein import Wasserstein, wasserstein
    from cka_probe.networks.models import Subject, load_subject
    from cka_probe.probing.compare import compare
    from cka_probe.probing.extract import extract
    from cka_probe.reports.figures.atlas import plot_atlas
    from cka_probe.reports.figures.curve import plot_curve
    from cka_probe.reports.figures.heatmaps import plot_pairs
    from cka_probe.reports.figures.layers import plot_layers
    from cka_probe.reports.figures.profile import plot_profile
    from cka_probe.reports.plots import plot_difference, plot_heatmap
    from cka_probe.reports.writing import write_report
    from cka_probe.results.provenance import Provenance
    from cka_probe.results.similarity import Curve, Influence, Layer, Similarity

_HOMES = {
    "CC": "distill.methods.cc",
    "CRD": "distill.methods.crd",
    "CkaProbeError": "errors",
    "Curve": "results.similarity",
    "DIST": "distill.methods.dist",
    "DKD": "distill.methods.dkd",
    "EnergyDistance": "measures.energy",
    "FBT": "distill.methods.fbt",
    "FitNet": "distill.methods.fitnet",
    "Influence": "results.similarity",
    "KD": "distill.methods.kd",
    "Layer": "results.similarity",
    "LinearCKA": "measures.linear_cka",
    "MMD": "measures.mmd",
    "Mantel": "measures.mantel",
    "MeanCCA": "measures.cca",
    "MutualKNN": "measures.knn",
    "OBoW": "distill.methods.visual_words.obow",
    "OFA": "distill.methods.ofa",
    "PWCCA": "measures.cca",
    "Preprocessing": "images.preprocessing",
    "Procrustes": "measures.procrustes",
    "RKD": "distill.methods.rkd",
    "RSA": "measures.rsa",
    "RSD": "distill.methods.rsd",
    "RbfCKA": "measures.rbf_cka",
    "SVCCA": "measures.cca",
    "Scratch": "distill.methods.none",
    "Similarity": "results.similarity",
    "Provenance": "results.provenance",
    "Subject": "networks.models",
    "Wasserstein": "measures.wasserstein",
    "Words": "distill.methods.visual_words.words",
    "capture": "activations.hooks",
    "compare": "probing.compare",
    "distill": "distill",
    "energy_distance": "measures.energy",
    "evaluate": "distill.evaluation.accuracy",
    "extract": "probing.extract",
    "linear_cka": "measures.linear_cka",
    "load_subject": "networks.models",
    "mantel": "measures.mantel",
    "mean_cca": "measures.cca",
    "mmd": "measures.mmd",
    "mutual_knn": "measures.knn",
    "plot_atlas": "reports.figures.atlas",
    "plot_curve": "reports.figures.curve",
    "plot_difference": "reports.plots",
    "plot_heatmap": "reports.plots",
    "plot_layers": "reports.figures.layers",
    "plot_pairs": "reports.figures.heatmaps",
    "plot_profile": "reports.figures.profile",
    "procrustes": "measures.procrustes",
    "procrustes_angle": "measures.procrustes",
    "pwcca": "measures.cca",
    "rbf_cka": "measures.rbf_cka",
    "rsa": "measures.rsa",
    "svcca": "measures.cca",
    "wasserstein": "measures.wasserstein",
    "write_report": "reports.writing",
}

__all__ = [
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "FBT",
    "KD",
    "MMD",
    "OFA",
    "PWCCA",
    "RKD",
    "RSA",
    "RSD",
    "SVCCA",
    "CkaProbeError",
    "Curve",
    "EnergyDistance",
    "FitNet",
    "Influence",
    "Layer",
    "LinearCKA",
    "Mantel",
    "MeanCCA",
    "MutualKNN",
    "OBoW",
    "Preprocessing",
    "Procrustes",
    "Provenance",
    "RbfCKA",
    "Scratch",
    "Similarity",
    "Subject",
    "Wasserstein",
    "Words",
    "capture",
    "compare",
    "distill",
    "energy_distance",
    "evaluate",
    "extract",
    "linear_cka",
    "load_subject",
    "mantel",
    "mean_cca",
    "mmd",
    "mutual_knn",
    "plot_atlas",
    "plot_curve",
    "plot_difference",
    "plot_heatmap",
    "plot_layers",
    "plot_pairs",
    "plot_profile",
    "procrustes",
    "procrustes_angle",
    "pwcca",
    "rbf_cka",
    "rsa",
    "svcca",
    "wasserstein",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: torch and matplotlib take seconds, and ``--help`` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cka_probe' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"cka_probe.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
