"""Numbers of bytes, read from a user's text and written for a reader."""

from __future__ import annotations

import re
from numbers import Integral

from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import shown

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_MOST_BYTES = 10**18


def parse_bytes(size: str | int) -> int:
    """A number of bytes: ``"8GB"`` (10⁹), ``"6GiB"`` (2³⁰), ``"500MB"``; a whole number is one already.

    Raises:
        SpecError: it is none of these.

    >>> parse_bytes("1.5 GB"), parse_bytes("2GiB")
    (1500000000, 2147483648)
    """
    if isinstance(size, Integral) and not isinstance(size, bool):
        count = int(size)
    else:
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]I?B)", str(size).strip().upper(), re.ASCII)
        count = int(float(found[1]) * _UNITS[found[2]]) if found is not None else 0
    if not 0 < count <= _MOST_BYTES:
        raise SpecError(
            f"--memory must be a size with a unit, such as 8GB, 500MB or 6GiB, above 0 and at most 1,000,000 TB, but "
            f"is {shown(size)}."
        )
    return count


def format_bytes(size: float) -> str:
    """A number of bytes for a reader: ``1.53 GB``."""
    for unit in ("TB", "GB", "MB"):
        if size >= 0.9995 * _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{max(size, 0) / 1e3:.0f} kB"
