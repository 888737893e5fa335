"""What a number may be: ranges, and the sentence that refuses a number outside of one. Importing this loads nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from cka_probe.errors import SpecError

LARGEST = sys.float_info.max
_SHOWN = 60


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have; never NaN, never infinite, and no booleans.

    Attributes:
        low: the smallest.
        high: the largest.
        whole: only integers, NumPy's included.
        open_low: ``low`` itself is not allowed.
        open_high: ``high`` itself is not allowed.
        optional: None is allowed too.
        many: a sequence of such numbers, at least one of them unless it is ``optional``.
        reason: why, for the message.
    """

    low: float = 0
    high: float = LARGEST
    whole: bool = False
    open_low: bool = False
    open_high: bool = False
    optional: bool = False
    many: bool = False
    reason: str = ""

    def __contains__(self, number: Any) -> bool:
        """Whether it is one of them."""
        kind: Any = Integral if self.whole else Real
        if isinstance(number, bool) or not isinstance(number, kind):
            return False
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "finite number" if self.high == LARGEST else "number"
        bounds = [f"above {self.low:g}"] if self.open_low else [f"of at least {self.low:,}"]
        if self.high != LARGEST:
            bounds.append(f"below {self.high:,}" if self.open_high else f"at most {self.high:,}")
        if not self.open_low and bounds[-1].startswith("at most"):
            bounds = [f"from {self.low:,} to {self.high:,}"]
        return f"{f'{kind}s, each' if self.many else f'a {kind}'} {' and '.join(bounds)}"

    def check(self, what: str, value: Any) -> None:
        """Raise a SpecError where a value is not in the range.

        Args:
            what: it is called in the message: a flag.
            value: of the option; for ``many``, a sequence.

        >>> Range(4, 100, whole=True).check("--examples", 3)
        Traceback (most recent call last):
        cka_probe.errors.SpecError: --examples must be a whole number from 4 to 100, but is 3.
        """
        if value is None and self.optional:
            return
        values: Sequence[Any] = [value]
        if self.many:
            values = list(value) if _is_sequence(value) else [None]
        if not all(number in self for number in values) or not (values or self.optional):
            reason = f" ({self.reason})" if self.reason else ""
            raise SpecError(f"{what} must be {self}{reason}, but is {shown(value)}.")


SEED = Range(0, 2**64 - 1, whole=True)
"""What both PyTorch's generators and NumPy's take."""

LEAST_EXAMPLES = Range(4, 10**9, whole=True, reason="the debiased CKA needs 4 images")
IMAGE_SIZE = Range(1, 16_384, whole=True, optional=True)
COUNT = Range(1, 10**6, whole=True)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise a SpecError where the value of an option is none of its choices."""
    if not any(value is choice or value == choice for choice in choices):
        listed = ", ".join(str(choice) for choice in choices if choice is not None)
        raise SpecError(f"{flag(name)} must be one of {listed}, but is {shown(value)}.")


def flag(name: str) -> str:
    """What the command line calls an option.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value.tolist() if hasattr(value, "tolist") else value)
    except ValueError:  # Python does not write whole numbers of more than some 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    >>> listed(["ofa"]), listed(["kd", "dkd", "ofa"])
    ('ofa', 'kd, dkd and ofa')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping))


MIN_EXAMPLES = 4
"""Below 4 examples the unbiased HSIC, with n - 3 in its denominator, does not exist."""
