"""The methods by the names that ``--method`` knows. A new one is a file beside these and a line here."""

from __future__ import annotations

from cka_probe.distill.methods.cc import CC
from cka_probe.distill.methods.crd import CRD
from cka_probe.distill.methods.dist import DIST
from cka_probe.distill.methods.dkd import DKD
from cka_probe.distill.methods.fitnet import FitNet
from cka_probe.distill.methods.kd import KD
from cka_probe.distill.methods.method import Method, Needs, Seen, Setting, Side
from cka_probe.distill.methods.none import Scratch
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.rkd import RKD

METHODS: dict[str, type[Method]] = {
    "none": Scratch,
    "kd": KD,
    "ofa": OFA,
    "fitnet": FitNet,
    "cc": CC,
    "rkd": RKD,
    "crd": CRD,
    "dkd": DKD,
    "dist": DIST,
}

__all__ = ["METHODS", "Method", "Needs", "Seen", "Setting", "Side"]
