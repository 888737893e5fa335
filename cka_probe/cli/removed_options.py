"""Options of version 0.1 that are gone, and what to write in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from cka_probe.errors import SpecError

P = ParamSpec("P")
R = TypeVar("R")

_OF_MEASURES = {
    "threshold": "cka-rbf",
    "median": "cka-rbf",
    "rdm": "rsa",
    "rdm_comparison": "rsa",
    "neighbours": "mutual-knn",
    "debiased": "cka",
}
"""Option -> a measure that it belonged to."""

_RENAMED = {"cache": "scratch"}

RENAMED_OF_DISTILL = {"memory": "image_cache"}
"""Option of ``distill`` -> its name now."""


def refuse_renamed_flags_of_distill(arguments: Sequence[str]) -> None:
    """Raise a SpecError where a command line of ``distill`` has a flag that is called otherwise now."""
    for argument in arguments:
        written = argument.partition("=")[0]
        name = written[2:].replace("-", "_") if written.startswith("--") else ""
        if name in RENAMED_OF_DISTILL:
            raise SpecError(f"{written} is called --{RENAMED_OF_DISTILL[name].replace('_', '-')} now.")


def refuse_removed_flags(arguments: Sequence[str]) -> None:
    """Raise a SpecError where a command line of ``compare`` has one of these flags."""
    for index, argument in enumerate(arguments):
        written, equals, value = argument.partition("=")
        name = written[2:].replace("-", "_") if written.startswith("--") else ""
        if name == "no_debiased":
            name, value = "debiased", "biased"
        elif not equals and name != "debiased":
            value = next((one for one in arguments[index + 1 : index + 2] if not one.startswith("-")), "")
        if name in _RENAMED:
            raise SpecError(f"{written} is called --{_RENAMED[name]} now.")
        if name in _OF_MEASURES:
            raise SpecError(f"{written} is a part of the measure now: --measures {_spec(name, value)}")


def refusing_removed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises a SpecError where it is given one of these options as a keyword."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        _refuse_removed_keywords(kwargs)
        return function(*args, **kwargs)

    return checked


def _refuse_removed_keywords(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _RENAMED:
            raise SpecError(f"{name} is called {_RENAMED[name]} now.")
        if name in _OF_MEASURES:
            text = {True: "", False: "biased"}[value] if isinstance(value, bool) else str(value)
            raise SpecError(f"{name} is a part of the measure now: measures={_spec(name, text)!r}")


def _spec(option: str, value: str) -> str:
    measure = _OF_MEASURES[option]
    return f"{measure}:{value}" if value else measure
