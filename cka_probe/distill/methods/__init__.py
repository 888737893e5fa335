"""The methods by the names that ``--method`` knows. A new one is a file beside these and a line here."""

from __future__ import annotations

from difflib import get_close_matches

from cka_probe.distill.methods.cc import CC
from cka_probe.distill.methods.crd import CRD
from cka_probe.distill.methods.dist import DIST
from cka_probe.distill.methods.dkd import DKD
from cka_probe.distill.methods.fbt import FBT
from cka_probe.distill.methods.fitnet import FitNet
from cka_probe.distill.methods.kd import KD
from cka_probe.distill.methods.method import Method, Needs
from cka_probe.distill.methods.none import Scratch
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.rkd import RKD
from cka_probe.distill.methods.rsd import RSD
from cka_probe.distill.methods.visual_words.obow import OBoW
from cka_probe.distill.methods.visual_words.words import Words
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import shown

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Scratch, KD, OFA, FBT, FitNet, CC, RKD, CRD, RSD, DKD, DIST, OBoW, Words)
}

__all__ = ["METHODS", "Method", "Needs", "method_named"]


def method_named(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        SpecError: there is no such method.

    >>> method_named("kd")(temperature=4)
    KD(ce_weight=1.0, temperature=4, kd_weight=1.0, standardize_logits=False)
    """
    if not isinstance(name, str) or name not in METHODS:
        close = get_close_matches(str(name).lower(), METHODS, n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise SpecError(f"--method must be one of {', '.join(METHODS)}, but is {shown(name)}.{hint}")
    return METHODS[name]
