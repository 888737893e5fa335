"""The cost model: bytes, floating-point operations and seconds of a comparison, from its sizes. Pure arithmetic.

``n`` examples a batch, ``L`` layers in all, float32 activations and Gram matrices, float64 sums. A comparison is three
parts: the networks' forward passes; a Gram matrix a layer, 3/2 n² d operations on d features (it is symmetric, and two
products leave out a quarter of 2 n² d); and the product of all pairs, once for the values and once for their control,
2 L² n (n + 1) operations a batch. So time is linear in the layers as long as the last part is small, which it is: at
n = 128 a layer costs 3/2 n d in the second part an image, and 2 L n in the third, and d is some 100,000 where L is 240.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from numbers import Integral

from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import shown

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_MOST_BYTES = 10**18

_CENTERING_BYTES = 116
"""Moved for an entry of a Gram matrix: copied to float64, centered and tested, and its triangle taken out twice."""


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


def told_bytes(size: float) -> str:
    """A number of bytes for a reader: ``1.53 GB``."""
    for unit in ("TB", "GB", "MB"):
        if size >= 0.9995 * _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{max(size, 0) / 1e3:.0f} kB"


@dataclass(frozen=True)
class Work:
    """What is measured, whatever the networks.

    Attributes:
        examples: images.
        batch: images at a time, n.
        layers: of all subjects, L; 0 where they are not known yet.
        linear: how many measures have a linear kernel; they share their Gram matrices.
        rbf: how many have an RBF kernel.
        permutations: of a permutation test.
        influence: whether each example is left out.
        processes: that share the batches; all that is told of memory, files and time is of one of them.
    """

    examples: int
    batch: int
    layers: int = 0
    linear: int = 1
    rbf: int = 0
    permutations: int = 0
    influence: bool = False
    processes: int = 1

    @property
    def batches(self) -> float:
        """Batches of one process, a shorter last one counting as a part."""
        return self.examples / self.batch / self.processes

    @property
    def gram_bytes(self) -> int:
        """Of the Gram matrices of one layer for one batch, before they are centered."""
        return self.batch**2 * (4 * bool(self.linear) + 8 * self.rbf)

    @property
    def kept_bytes(self) -> int:
        """Of the Gram matrices of all batches, in a file: each measure's own."""
        return ceil(self._matrices * (4 * self.linear + 8 * self.rbf) * self.batches)

    @property
    def sums(self) -> dict[str, int]:
        """What the measures themselves hold, in bytes, by part."""
        measures, pairs, n = self.linear + self.rbf, self.layers**2, self.batch
        if not measures:
            return {}
        parts = {"triangles": measures * (8 * self._matrices + 16 * n**2 + max(1 << 22, 8 * n**2) + 80 * pairs)}
        if self.permutations:  # the sums, and the test of them at the end; each permutation moves the triangles
            parts["permutations"] = measures * 8 * pairs * self.permutations * 5 + 4 * self._matrices + 24 * n**2
        if self.influence:  # what is kept, and the matrices made whole again
            parts["influence"] = measures * 12 * pairs * self.examples + 16 * pairs * n + 24 * self._matrices
        return parts

    @property
    def _matrices(self) -> int:
        return self.layers * self.batch**2


@dataclass(frozen=True)
class NetworkCost:
    """What one network takes, through all its views.

    Attributes:
        name: for messages.
        weights: bytes, beyond those that are in memory even when it does not run.
        working: bytes of intermediate results in a forward pass of a batch, at most.
        flops: of a forward pass of one image.
        moved: bytes that its operations read and write, of one image.
        widths: features of each of its layers.
        looks: the kinds of images that it sees, by number.
        seconds: of a batch, its Gram matrices included; NaN where it was not timed.
    """

    name: str
    weights: int
    working: int
    flops: float = 0.0
    moved: float = 0.0
    widths: Sequence[int] = ()
    looks: frozenset[int] = frozenset()
    seconds: float = float("nan")


@dataclass(frozen=True)
class ImageCost:
    """What it takes to have the images.

    Attributes:
        size: of each kind, the bytes of one image.
        seconds: of each kind, the time to make it of one image that was read, in one process.
        reading: seconds to read one image.
        workers: processes that read them; 0 is this one.
        threads: that the networks compute with, on the same cores; 0 on a GPU.
        cores: of the machine.
    """

    size: Sequence[int]
    seconds: Sequence[float]
    reading: float = 0.0
    workers: int = 0
    threads: int = 0
    cores: int = 1

    def held(self, looks: Iterable[int], batch: int) -> int:
        """Bytes of the batches that are there at once: the one that is used and, beside workers, the next one."""
        return sum(self.size[look] for look in looks) * batch * (2 if self.workers else 1)

    def together_with(self, computing: float, looks: Iterable[int], batch: int) -> float:
        """Seconds a batch, where workers read one while another is computed, on as many cores as there are."""
        kinds = list(looks)
        reading = (self.reading + sum(self.seconds[look] for look in kinds)) * batch if kinds else 0.0
        if not self.workers:
            return reading + computing
        cores = max(self.cores, 1)
        return max(computing, reading / min(self.workers, cores), (reading + computing * self.threads) / cores)


@dataclass(frozen=True)
class Part:
    """One part of a comparison: floating-point operations, and bytes read and written."""

    name: str
    flops: float
    moved: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """On a machine that does so many operations and moves so many bytes a second, the slower of the two ruling."""
        return max(self.flops / flops, self.moved / bandwidth)


def parts_of(costs: Sequence[NetworkCost], work: Work) -> tuple[Part, Part, Part]:
    """Forward passes, Gram matrices and the product of all pairs, of linear CKA on all examples."""
    n, layers, batches = work.batch, work.layers, work.batches
    width = sum(sum(cost.widths) for cost in costs)
    weights = sum(cost.weights for cost in costs)
    return (
        Part(
            "forward passes",
            sum(cost.flops for cost in costs) * work.examples,
            sum(cost.moved for cost in costs) * work.examples + weights * batches,
        ),
        Part("Gram matrices", 1.5 * n**2 * width * batches, (4 * n * width + 12 * n**2 * layers) * batches),
        Part(
            "all pairs",
            2 * layers**2 * n * (n + 1) * (1 + work.permutations / 2) * batches,
            (_CENTERING_BYTES + 12) * n**2 * layers * batches,
        ),
    )
