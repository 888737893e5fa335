"""Kernels and the update of every measure on fake CUDA tensors: one device, and no needless wait in the loop."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cka_probe.estimation.gram import Features
from cka_probe.estimation.gram_file import GramFile, StoredGrams
from cka_probe.estimation.kernels import centered_product, exact_gram, uncentered_product
from cka_probe.estimation.precision import Precision
from cka_probe.measures.catalogue import MEASURES
from tests.fake_cuda.device import CUDA, fake_cuda
from tests.measures_at_work import start

FIRST_BATCH = {("kernels.py:is_precise", "value"), ("kernels.py:_median", "value")}
"""What decides for all batches is waited for once."""

STEADY = {
    ("devices.py:read", "copy ahead"),
    ("devices.py:finish", "event"),  # of the batch before: the device has the next one's work
    ("feature_store.py:prepare", "copy ahead"),
    ("feature_store.py:update", "stream"),  # the features of all layers, whose copies run at once
}
"""What every batch does."""


def steps(receiver, batches: int = 3, n: int = 16, d: int = 40) -> list[Counter[tuple[str, str]]]:
    """What the host reads in each batch."""
    found = []
    with fake_cuda() as access:
        precision = Precision()
        for batch in range(batches):
            access.found.clear()
            for layer in range(2):
                features = precision.features(layer, torch.empty(n, d, device=CUDA))
                receiver.prepare(layer, features)
                precision.note(layer, features)
            receiver.update(batch * n)
            precision.end_batch()
            found.append(Counter(access.found))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [uncentered_product, centered_product])
def test_kernels_stay_on_the_device(make, dtype: torch.dtype) -> None:
    with fake_cuda() as access:
        product = make(torch.empty(8, 5000, device=CUDA, dtype=dtype))
        exact = exact_gram(torch.empty(8, 5000, device=CUDA, dtype=dtype))
        assert all(made.is_cuda for made in (product.gram, product.statistics, exact))
        assert not access.found


def test_features_far_out_of_range_are_scaled_on_the_device() -> None:
    with fake_cuda() as access:
        features = Features(torch.empty(8, 50, device=CUDA, dtype=torch.float64))
        features.exponent = -700
        assert features.gram.is_cuda
        assert not access.found


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_waits_for_nothing_but_what_is_named(name: str) -> None:
    first, *later = steps(start(name, ["a", "a"]))
    assert set(first) <= FIRST_BATCH | STEADY
    for found in later:
        assert set(found) <= STEADY
        assert found["feature_store.py:update", "stream"] <= 1


def test_gram_matrices_that_wait_for_other_networks_are_waited_for_once_a_batch() -> None:
    _, *later = steps(StoredGrams(start("cka", ["a", "b"]), ["a", "b"], GramFile()))
    for found in later:
        assert found.pop(("gram_file.py:prepare", "copy ahead")) == 2
        assert found.pop(("gram_file.py:update", "stream")) == 1
        assert set(found) <= STEADY


class _Broken:
    """A measure with a fault."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def prepare(self, layer: int, features: Features) -> None:
        if self._fault == "item" and features.x.sum().item() > 0:
            self._last = features.x
        if self._fault == "copy":
            self._last = features.x.cpu()
        if self._fault == "mask":
            self._last = features.x.masked_fill(features.x > 0, 0)
            self._last[self._last > 0] = features.x.new_ones(1)
        if self._fault == "device":
            self._last = torch.zeros(40) + features.x

    def update(self, first: int) -> None:
        pass


@pytest.mark.parametrize(("fault", "kind"), [("item", "value"), ("copy", "copy"), ("mask", "size")])
def test_a_hidden_wait_is_found_with_its_place(fault: str, kind: str) -> None:
    _, *later = steps(_Broken(fault))
    assert all(found[("test_measures.py:prepare", kind)] == 2 for found in later)


def test_a_mixed_device_is_found() -> None:
    with pytest.raises(RuntimeError, match="same device|two different devices"):
        steps(_Broken("device"))
