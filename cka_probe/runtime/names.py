"""Names that hold anything a file system allows: as a line of a text file, as bytes, and for a reader."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import count

_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Line breaks and other control characters, and surrogates, which stand for bytes that are not UTF-8."""

_LONGEST = 80  # of a name of a subject in that of a file; a file system takes 255 bytes for two of them


def quoted(name: str) -> str:
    r"""A name as one line of UTF-8: as it is, or as a JSON string where it would not be one; `unquoted` reads it.

    >>> quoted("cats/ümläut.png"), quoted("two\nlines.png")
    ('cats/ümläut.png', '"two\\nlines.png"')
    """
    return json.dumps(name) if _ODD.search(name) or name.startswith('"') else name


def unquoted(line: str) -> str:
    r"""The name that `quoted` wrote.

    >>> unquoted(quoted("two\nlines.png")) == "two\nlines.png"
    True
    """
    if not line.startswith('"'):
        return line
    try:
        name = json.loads(line)
    except ValueError:  # a name that an earlier version wrote as it is
        return line
    return name if isinstance(name, str) else line


def readable(name: str) -> str:
    r"""A name for a reader: what cannot be shown as a backslash and its code, everything else as it is.

    >>> readable("x\udcff\n.png")
    'x\\udcff\\n.png'
    """
    return _ODD.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), name)


def utf8(name: str) -> str:
    r"""A name as tables hold it: bytes that are not UTF-8 as a backslash and their code. PyArrow's strings need that.

    >>> utf8("ümläut\udcff")
    'ümläut\\udcff'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def name_bytes(name: str) -> bytes:
    """The bytes of a name, different for different names also where it is no valid Unicode."""
    return name.encode("utf-8", "surrogatepass")


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """Label -> a name for its files, without a suffix: what a file system may not like is left out, no two are equal.

    >>> file_names(["zoo:vit [noise:0.2]", "a/b", "a:b"])
    {'zoo:vit [noise:0.2]': 'zoo_vit_noise_0.2', 'a/b': 'a_b', 'a:b': 'a_b-1'}
    """
    names: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^\w.@=-]+", "_", label).strip("_.")[-_LONGEST:].lstrip("_.") or "subject"
        free = (f"{plain}{f'-{number}' if number else ''}" for number in count())
        taken = {name.lower() for name in names.values()}
        names[label] = next(name for name in free if name.lower() not in taken)
    return names
