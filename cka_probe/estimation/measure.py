"""What a measure is: its options, what a reader needs to know of it, how it runs, and the spec that names it.

A spec is the name and the options that differ from their defaults, with colons between them and in any order:
``cka``, ``cka:biased``, ``cka-rbf:0.8:with-diagonal``, ``rsa:euclidean:kendall``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import SpecError
from cka_probe.estimation.estimates import VALUES_ONLY, Estimates, Requests
from cka_probe.runtime.ranges import Range, shown

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from cka_probe.estimation.arrays import Array
    from cka_probe.estimation.feature_store import FeatureStore
    from cka_probe.estimation.gram import Features
    from cka_probe.runtime.world import World

Kind = Literal["similarity", "distance"]

Estimator = Literal["debiased", "biased"]
"""Of HSIC: the unbiased one of Song et al. (2012), or the biased one of Gretton et al. (2005)."""

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class About:
    """What a reader needs to know of a measure.

    Attributes:
        title: for headings and axes.
        range: of its values.
        invariant_to: what may be done to the features of either side without changing a value.
        source: the paper.
        kind: a similarity is 1 for identical layers, a distance 0.
        paired: whether it sees which example of one side belongs to which of the other. One that does not compares
            two distributions, and is the same on shuffled examples.
        zero_by_chance: whether it is 0 on average for unrelated features, however few the examples.
        fisher_interval: whether its interval is made on Fisher's scale, arctanh, where a value near 1 scatters alike
            to both sides, and so stays below 1.
    """

    title: str
    range: str = "-1 to 1"
    invariant_to: str = ""
    source: str = ""
    kind: Kind = "similarity"
    paired: bool = True
    zero_by_chance: bool = False
    fisher_interval: bool = False

    @property
    def identical(self) -> float:
        """The value of a layer with itself."""
        return 0.0 if self.kind == "distance" else 1.0

    def closeness(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values on a scale that grows with the likeness: a distance with its sign turned."""
        return -values if self.kind == "distance" else values


class Accumulator(Protocol):
    """A measure at work: takes the features of every layer batch by batch, and computes the values at the end."""

    def prepare(self, layer: int, features: Features) -> None: ...

    def update(self, first: int) -> None: ...

    def settle(self, world: World) -> None: ...

    def merge(self, world: World) -> None: ...

    def state(self, folder: Path) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None: ...

    def compute(self) -> Estimates: ...


@dataclass(frozen=True)
class Setup:
    """What a measure starts with.

    Attributes:
        labels: of the layers, one each, for messages.
        names: of the layers, each in its network.
        store: of features, shared by all measures that need every example at once.
        seed: of the shuffled control and of the permutations.
        requests: what is wanted beside the values.
    """

    labels: Sequence[str]
    names: Sequence[str]
    store: FeatureStore
    seed: int = 0
    requests: Requests = VALUES_ONLY


@dataclass(frozen=True)
class Measure:
    """A measure with its options: what a spec such as ``cka-rbf:0.8`` stands for.

    A subclass is a frozen dataclass in a file of its own, and is listed in `cka_probe.measures.catalogue`. Its fields
    are the options. Each has a default. One at most is a number (``int`` or ``float``, annotated with the `Range` of
    its values); the others are words (``Literal``), no word in two of them, so that a word alone says which option it
    sets.

    Attributes:
        name: in a spec.
        about: what a reader needs to know.
        gram_bytes: of an entry of the Gram matrix that a layer has in each batch; 0 where the measure makes none.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    gram_bytes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the options, and take NumPy's numbers for Python's.

        Raises:
            SpecError: an option has a value that it cannot have.
        """
        for option, (kind, allowed) in options_of(type(self)).items():
            value = getattr(self, option)
            if isinstance(allowed, Range):
                allowed.check(f"The {option} of {self.name}", value)
                object.__setattr__(self, option, kind(value))
            elif value not in allowed:
                words = ", ".join(allowed)
                raise SpecError(f"The {option} of {self.name} must be one of {words}, but is {shown(value)}.")

    def __str__(self) -> str:
        """The spec in its canonical form: options in the order of the fields, those with their defaults left out."""
        return ":".join([self.name, *self.tokens()])

    def __call__(self, x: Array, y: Array) -> float:
        """The measure of two representations of the same examples, (n, d₁) and (n, d₂).

        Raises:
            FeatureError: it is undefined for them, or they are no such arrays.
        """
        raise NotImplementedError

    def start(self, setup: Setup) -> Accumulator:
        """The measure of all pairs of layers, ready for the first batch."""
        raise NotImplementedError

    def check(self, examples: int) -> None:
        """Raise where so many examples are too few, whatever the layers.

        Raises:
            SpecError: it says how many are needed.
        """

    @property
    def label(self) -> str:
        """For legends and axes: the title, with the options that differ from their defaults in brackets."""
        tokens = self.tokens()
        return f"{self.about.title} ({', '.join(tokens)})" if tokens else self.about.title

    @property
    def description(self) -> str:
        """For captions: the title, and the options in words."""
        return self.label

    def tokens(self) -> list[str]:
        """The options that differ from their defaults, as a spec has them."""
        changed = (field.name for field in fields(self) if getattr(self, field.name) != field.default)
        return [_token(getattr(self, name)) for name in changed]

    @classmethod
    def parse(cls, tokens: Sequence[str]) -> Self:
        """The measure with the options that the tokens set, in any order.

        Raises:
            SpecError: a token sets no option, or one that another has set, or to a value that it cannot have.
        """
        options = options_of(cls)
        found: dict[str, Any] = {}
        said: dict[str, str] = {}
        for token in tokens:
            option = next((name for name, option in options.items() if _sets(token, option[1])), None)
            if option is None:
                raise SpecError(_unknown_token(cls, token))
            if option in found:
                raise SpecError(
                    f"{cls.name} takes one {option}, but {said[option]!r} and {token!r} both set it. Leave one out."
                )
            kind, allowed = options[option]
            found[option], said[option] = _number(token, kind) if isinstance(allowed, Range) else token, token
        return cls(**found)


def options_of(measure: type[Measure]) -> dict[str, tuple[Any, Range | tuple[str, ...]]]:
    """The options of a measure: for each its type, and its range or its words."""
    found: dict[str, tuple[Any, Range | tuple[str, ...]]] = {}
    hints = get_type_hints(measure, include_extras=True)
    for field in fields(measure):
        hint = hints[field.name]
        if get_origin(hint) is Literal:
            found[field.name] = (str, get_args(hint))
        else:
            kind, range_ = get_args(hint)
            found[field.name] = (kind, range_)
    return found


def grammar(measure: type[Measure]) -> str:
    """The spec with all options.

    >>> from cka_probe.measures.rsa import RSA
    >>> grammar(RSA)
    'rsa[:correlation|euclidean|cosine][:spearman|kendall|pearson]'
    """
    parts = (
        f"[:{option.upper() if isinstance(allowed, Range) else '|'.join(allowed)}]"
        for option, (_, allowed) in options_of(measure).items()
    )
    return measure.name + "".join(parts)


def _sets(token: str, allowed: Range | tuple[str, ...]) -> bool:
    return _NUMBER.fullmatch(token) is not None if isinstance(allowed, Range) else token in allowed


def _number(token: str, kind: type) -> Any:
    """The number that a token is; a float where a whole one is wanted and it is none, which the range refuses."""
    number = float(token)
    return int(number) if kind is int and number.is_integer() else number


def _token(value: str | float) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _unknown_token(measure: type[Measure], token: str) -> str:
    words = [word for _, allowed in options_of(measure).values() if not isinstance(allowed, Range) for word in allowed]
    asked = token.lower()
    close = [word for word in words if asked and asked in word] or get_close_matches(asked, words, n=2)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if token and _NUMBER.fullmatch(token):
        hint = ""
    return f"{measure.name} has no option {shown(token)}.{hint} Its form is {grammar(measure)}."
