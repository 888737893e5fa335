"""The control that proves the tool: what must hold of every measure, tried on this machine, device and dtype.

Features are 512 draws of 8 correlated normals. Their own images under a rotation, a shuffle and a large offset have
answers that are known beforehand. A last part runs a bundled network on real digits through the whole loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.estimation.gram import Features
from cka_probe.estimation.measure import Measure
from cka_probe.measures.catalogue import MEASURES, about
from cka_probe.measures.cca import PWCCA
from cka_probe.measures.knn import MutualKNN
from cka_probe.measures.linear_cka import LinearCKA, linear_cka
from cka_probe.measures.mantel import Mantel
from cka_probe.probing.compare import compare
from cka_probe.probing.measuring import start_measures
from cka_probe.probing.options import Measuring
from cka_probe.results.similarity import Layer
from cka_probe.runtime.devices import device_named

Dtype = Literal["float64", "float32", "float16", "bfloat16"]

EXAMPLES, WIDTH = 512, 8
_OFFSET = 100.0


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        name: what was tried.
        expected: the value that is known beforehand.
        found: the one that came out.
        tolerance: by how much they may differ.
    """

    name: str
    expected: float
    found: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it holds; a NaN does not."""
        return abs(self.found - self.expected) <= self.tolerance


def run_checks(*, device: str = "auto", dtype: Dtype = "float32") -> Iterator[Check]:
    """Try everything, one after the other, as the results are asked for.

    Args:
        device: as for `cka_probe.compare`.
        dtype: of the features that are handed to the measures.

    Raises:
        SpecError: the device is not there; at once.
    """
    return _all_checks(device_named(device), device, dtype)


def _all_checks(where: torch.device, device: str, dtype: Dtype) -> Iterator[Check]:
    yield from _golden(where)
    yield from _controls(where, dtype)
    yield from _functions(where, dtype)
    yield from _offset(where)
    yield from _network(device)


def _golden(where: torch.device) -> Iterator[Check]:
    """The notebook published with Kornblith et al. (2019)."""
    random = np.random.RandomState(1337)
    x = random.randn(100, 10)
    y = random.randn(100, 10) + x
    for debiased, expected in ((False, 0.5576132566), (True, 0.5134564895)):
        form = "debiased" if debiased else "biased"
        yield Check(f"golden value, linear CKA, {form}", expected, linear_cka(x, y, debiased=debiased), 1e-10)
    streamed = _values(LinearCKA(), [torch.from_numpy(x), torch.from_numpy(y)], where, batch=100)[0, 1]
    yield Check("golden value, linear CKA, one batch in the loop", 0.5134564895, streamed, 1e-9)


def _controls(where: torch.device, dtype: Dtype) -> Iterator[Check]:
    """Identical and shuffled views of the same features."""
    x = _features().to(getattr(torch, dtype))
    shuffled = x[torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(1))]
    for measure in (*_plain(), LinearCKA("biased")):
        identical, apart = (_values(measure, [x, other], where)[0, 1] for other in (x, shuffled))
        yield Check(f"identical views, {measure}", measure.about.identical, identical, 1e-6)
        yield Check(f"shuffled pairs, {measure}", 0.0, apart, _chance(measure))


def _functions(where: torch.device, dtype: Dtype) -> Iterator[Check]:
    """The measures of the loop against the functions on arrays."""
    x = _features().to(getattr(torch, dtype))
    y = (x.double() @ _rotation(WIDTH) * 2 + _features(seed=2)).to(x.dtype)
    for measure in _plain():
        if isinstance(measure, PWCCA):  # which has two values on arrays, one a direction
            continue
        expected = measure(x.double(), y.double())
        found = _values(measure, [x, y], where, batch=EXAMPLES)[0, 1]
        # A rank or a neighbour may change places with its next in float32: then RSA and k-NN move by little.
        tolerance = 2 / (measure.neighbours * EXAMPLES) if isinstance(measure, MutualKNN) else 1e-6
        yield Check(f"in the loop as on arrays, {measure}", expected, found, tolerance)


def _offset(where: torch.device) -> Iterator[Check]:
    """Float32 features far from the origin, where products lose most of their digits, against float64."""
    x = _features() + _OFFSET
    y = x @ _rotation(WIDTH) + _features(seed=2)
    expected = linear_cka(x, y)
    found = _values(LinearCKA(), [x.float(), y.float()], where, batch=EXAMPLES)[0, 1]
    yield Check(f"float32 at an offset of {_OFFSET:g} as float64, cka", expected, found, 1e-5)


def _network(device: str) -> Iterator[Check]:
    """A bundled network with itself, on real images, through the whole loop."""
    logging.disable(logging.WARNING)  # that distances say nothing of two networks; these are one
    try:
        results = compare(
            {"one": "zoo:cnn", "two": "zoo:cnn"}, measures=_plain(), examples=256, layers="stages", device=device
        )
    finally:
        logging.disable(logging.NOTSET)
    for measure, similarity in results.items():
        block = similarity.between("one", "two").values
        off = np.abs(block.diagonal() - about(measure).identical)
        yield Check(f"one network twice, on digits, {measure}", 0.0, float(off.max()), 1e-6)


def _plain() -> list[Measure]:
    """Every measure with its default options; Mantel's permutations, which change no value, are few."""
    return [Mantel(permutations=1) if measure is Mantel else measure() for measure in MEASURES.values()]


def _values(which: Measure, features: list[Tensor], where: torch.device, batch: int = 256) -> NDArray[np.float64]:
    layers = [Layer(str(index), "layer") for index in range(len(features))]
    examples = len(features[0])
    (measure,) = start_measures(layers, examples, Measuring(measures=which)).values()
    for start in range(0, examples, batch):
        for index, x in enumerate(features):
            measure.prepare(index, Features(x[start : start + batch].to(where)))
        measure.update(start)
    values: NDArray[np.float64] = measure.compute().values.cpu().numpy()
    return values


def _chance(measure: Measure) -> float:
    """Up to where a measure may be of unrelated examples: four times its spread, or the level of its bias.

    CKA, RSA and Mantel's r of independent features scatter by less than 1/√n, and the biased CKA has a bias of about
    d/n. Canonical correlations and Procrustes' cosine are up to about √(d/n) by chance, of which 1.5 times are granted;
    neighbours coincide in k/(n - 1). The distances differ by the pairs of an example with itself, 1/n
    of the distance of two examples, √(2d).
    """
    if not measure.about.paired:
        return 4 * sqrt(2 * WIDTH) / EXAMPLES
    return 4 / sqrt(EXAMPLES) if measure.about.zero_by_chance else 1.5 * sqrt(WIDTH / EXAMPLES)


def _features(seed: int = 0) -> Tensor:
    """(n, d) float64: correlated normals."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + 2 * torch.eye(WIDTH)
    return torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64) @ mixed


def _rotation(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return rotation
