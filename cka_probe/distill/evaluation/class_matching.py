"""Which logit of a network stands for which class of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.networks.models import Subject

_SHOWN = 3


@dataclass(frozen=True)
class Matching:
    """Which logit of a network stands for which class of the data.

    Attributes:
        logits: for each class of the data the number of its logit, from 0.
        how: for a reader.
    """

    logits: tuple[int, ...]
    how: str


def label_names(subject: Subject) -> tuple[str, ...] | None:
    """The names of a network's classes, in the order of its logits, as its configuration has them; else None."""
    if subject.classes:
        return tuple(subject.classes)
    config: Any = getattr(subject.network, "pretrained_cfg", None)
    names = (config if isinstance(config, Mapping) else vars(config) if config else {}).get("label_names")
    if isinstance(names, Mapping):  # of a JSON file: the number as a text -> the name
        try:
            names = [names[key] for key in sorted(names, key=int)]
        except (TypeError, ValueError):
            return None
    return tuple(map(str, names)) if names else None


def matched_classes(
    names_of_model: Sequence[str] | None, names_of_data: Sequence[str], count: int, model: str
) -> Matching:
    """Match by name where the network has names for its classes, else by order.

    A network may have more classes than the data if all classes of the data are among its names. Where either side has
    numbers for names, in order from 0, the other names are taken in their order.

    Args:
        names_of_model: in the order of its logits; None where they are not known.
        names_of_data: in the order of the labels.
        count: of the logits.
        model: its name, for messages.

    Raises:
        SpecError: the numbers of classes differ, or the names do.

    >>> matched_classes(["dog", "cat"], ["cat", "dog"], 2, "net")
    Matching(logits=(1, 0), how='by name')
    """
    own = list(names_of_model or ())
    classes = len(names_of_data)
    named = len(own) == count and len(set(own)) == count
    if named and set(names_of_data) <= set(own):
        more = f", {classes} of the network's {count}" if classes < count else ""
        return Matching(tuple(map(own.index, names_of_data)), f"by name{more}")
    if count != classes:
        raise SpecError(
            f"The network must have the data's {classes} classes, but {model!r} has {count}."
            + (f" {_missing(own, names_of_data)}" if named else "")
        )
    if named and not (_are_numbers(own) or _are_numbers(names_of_data)):
        raise SpecError(
            f"The classes of the data must have the names that {model!r} was trained with. "
            f"{_missing(own, names_of_data)} Rename the class folders, or remove label_names from the network's "
            "config.json to match by order."
        )
    return Matching(tuple(range(classes)), "by order")


def _missing(own: Sequence[str], names_of_data: Sequence[str]) -> str:
    odd = [name for name in names_of_data if name not in own]
    return f"It has no {_listed(odd)}; its classes are {_listed(own)}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]
