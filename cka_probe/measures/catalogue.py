"""All measures by name, and from a spec to the measure. A new measure is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache

from cka_probe.errors import SpecError
from cka_probe.estimation.measure import About, Measure, grammar, options_of
from cka_probe.measures.cca import PWCCA, SVCCA, MeanCCA
from cka_probe.measures.energy import EnergyDistance
from cka_probe.measures.knn import MutualKNN
from cka_probe.measures.linear_cka import LinearCKA
from cka_probe.measures.mantel import Mantel
from cka_probe.measures.mmd import MMD
from cka_probe.measures.procrustes import Procrustes
from cka_probe.measures.rbf_cka import RbfCKA
from cka_probe.measures.rsa import RSA
from cka_probe.measures.wasserstein import Wasserstein
from cka_probe.runtime.ranges import Range, shown

MEASURES: dict[str, type[Measure]] = {
    measure.name: measure
    for measure in (
        LinearCKA,
        RbfCKA,
        RSA,
        Mantel,
        MeanCCA,
        SVCCA,
        PWCCA,
        Procrustes,
        MutualKNN,
        MMD,
        EnergyDistance,
        Wasserstein,
    )
}

_RENAMED = {"cka-biased": "cka:biased"}
"""Names of version 0.1."""


def parse_measure(spec: str | Measure) -> Measure:
    """The measure that a spec names; a measure as it is.

    Raises:
        SpecError: there is no such measure, or it has no such options.

    >>> parse_measure("cka-rbf:with-diagonal:0.80")
    RbfCKA(threshold=0.8, median='with-diagonal', estimator='debiased')
    >>> str(parse_measure("cka-rbf:1.0"))
    'cka-rbf'
    """
    if isinstance(spec, Measure):
        return spec
    name, *tokens = str(spec).strip().split(":")
    if name not in MEASURES:
        raise SpecError(_unknown(str(spec).strip(), name))
    if tokens and (meant := f"{name}-{tokens[0].strip()}") in MEASURES:
        raise SpecError(f"{name} has no option {shown(tokens[0])}. Did you mean {':'.join([meant, *tokens[1:]])!r}?")
    return MEASURES[name].parse([token.strip() for token in tokens])


def parse_measures(specs: str | Measure | Iterable[str | Measure]) -> tuple[Measure, ...]:
    """The measures that specs name, in their order.

    Args:
        specs: one or several; a text may hold several with commas.

    Raises:
        SpecError: one is no measure, two are equal, or there is none.
    """
    given = [specs] if isinstance(specs, (str, Measure)) else list(specs)
    texts = [part for one in given for part in (one.split(",") if isinstance(one, str) else [one])]
    found: dict[Measure, str | Measure] = {}
    for text in texts:
        measure = parse_measure(text)
        if measure in found:
            written = "" if str(text) == str(found[measure]) else f", as {found[measure]} and as {text}"
            raise SpecError(f"--measures must name each measure once, but names {measure} twice{written}.")
        found[measure] = text
    if not found:
        raise SpecError(f"--measures must name at least one of {', '.join(MEASURES)}, but is empty.")
    return tuple(found)


def about(spec: str) -> About:
    """What a reader needs to know of the measure that a spec names; of an unknown one, that it is a similarity."""
    measure = _known(spec)
    return About(spec) if measure is None else measure.about


def label(spec: str) -> str:
    """What the measure that a spec names is called on axes and in legends; an unknown one by its spec."""
    measure = _known(spec)
    return spec if measure is None else measure.label


def description(spec: str) -> str:
    """The same with all options in words, for captions."""
    measure = _known(spec)
    return spec if measure is None else measure.description


@cache
def _known(spec: str) -> Measure | None:
    """The measure that a spec names; None where a newer version, or a user's own code, has written it."""
    try:
        return parse_measure(spec)
    except SpecError:
        return None


def _unknown(spec: str, name: str) -> str:
    if name in _RENAMED:
        return f"The measure {name} is called {_RENAMED[name]} now."
    asked = name.lower()
    close = [known for known in MEASURES if asked and asked in known] or get_close_matches(asked, MEASURES, n=3)
    hint = f" Did you mean {_either(close)}?" if close else ""
    return f"Unknown measure {shown(spec)} (--measures).{hint} All measures: {', '.join(MEASURES)}."


def _either(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))


def listing() -> list[tuple[str, list[str]]]:
    """The catalogue for a reader: for each measure the form of its spec, and sentences on what it is."""
    found = []
    for measure in MEASURES.values():
        facts = measure.about
        lines = [f"{facts.title} ({facts.source}). Values: {facts.range}.", f"Unchanged by {facts.invariant_to}."]
        if facts.kind == "distance":
            lines.append("Compares one layer under two views (--view, --paired).")
        for option, (_, allowed) in options_of(measure).items():
            if isinstance(allowed, Range):
                lines.append(f"{option.upper()}: {allowed}, by default {getattr(measure(), option):g}.")
        found.append((grammar(measure), lines))
    return found
