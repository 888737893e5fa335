"""Millions of paths in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Paths(Sequence[str]):
    """An immutable sequence of paths, kept as bytes behind each other.

    A list of strings takes twice the memory, and once more in each worker process that reads from it: to look at a
    Python object is to write its count of references.

    >>> paths = Paths(["a/1.png", "b/2.png"])
    >>> paths[1], list(paths), len(paths)
    ('b/2.png', ['a/1.png', 'b/2.png'], 2)
    """

    def __init__(self, paths: Iterable[str]) -> None:
        joined, ends = bytearray(), array("q")
        for path in paths:
            joined += os.fsencode(path)
            ends.append(len(joined))
        self._bytes, self._ends = bytes(joined), ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        position = range(len(self))[index]
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(self._bytes[start : self._ends[position]])
