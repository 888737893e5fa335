"""The cost model counts what the formulas of the measures need, and sizes of memory are read as people write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cka_probe.errors import SpecError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.probing.in_turn.cost import ImageCost, NetworkCost, Work, parse_bytes, parts_of, told_bytes
from tests.measures_at_work import start


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("6GiB", 6 * 2**30), ("500mb", 5 * 10**8), ("1.5 GB", 15 * 10**8), (1024, 1024)],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "64", "8 gigs", "GB", "-1GB", "0", "8G8", "1e9", None])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="such as 8GB"):
        parse_bytes(text)


def test_sizes_are_told_with_three_digits() -> None:
    assert [told_bytes(size) for size in (1_234_567_890, 123_456_789, 999_900_000, 12_345)] == [
        "1.23 GB", "123 MB", "1 GB", "12 kB",
    ]  # fmt: skip


def test_what_the_measure_holds_is_what_the_model_says() -> None:
    layers, n = 6, 96
    measure = start("cka", [str(index) for index in range(layers)])
    assert isinstance(measure, StreamingCKA)
    for layer in range(layers):
        measure.prepare(layer, Features(torch.randn(n, 5)))
    measure.update(0)
    workspace = measure._workspace
    held = sum(
        tensor.untyped_storage().nbytes()
        for tensor in (workspace._triangles, workspace._chunk, workspace._row)  # _column shares the latter's memory
    )
    said = Work(n, n, layers).sums["triangles"]
    assert held <= said <= 1.5 * held + (1 << 22)  # a chunk is at most 4 MiB; indices are made anew in each batch


def test_operations_are_those_of_the_products() -> None:
    n, widths = 32, (100, 300)
    costs = [NetworkCost("net", 0, 0, flops=7.0, widths=widths)]
    forward, grams, pairs = parts_of(costs, Work(examples=320, batch=n, layers=2))
    assert forward.flops == 7 * 320
    # Lower halves of the rows: n/2 x n/2 and n/2 x n, a multiplication and an addition each.
    assert grams.flops == 10 * sum(2 * d * (n // 2 * (n // 2) + n // 2 * n) for d in widths)
    triangle = n * (n + 1) // 2
    assert pairs.flops == 10 * 2 * (2 * 4) * triangle  # (2 x T) with (T x 4)


def test_a_part_takes_what_the_slower_of_arithmetic_and_memory_takes() -> None:
    _, grams, _ = parts_of([NetworkCost("net", 0, 0, widths=(1000,))], Work(64, 64, 1))
    assert grams.seconds(1.0, 1e30) == grams.flops
    assert grams.seconds(1e30, 1.0) == grams.moved


def test_time_is_linear_in_layers_where_features_are_wide() -> None:
    """Twice the networks take twice the time: the product of all pairs, quadratic, is a small part."""

    def seconds(networks: int) -> float:
        costs = [NetworkCost(str(index), 10**7, 0, 1e9, 4e7, (100_000,) * 12) for index in range(networks)]
        return sum(part.seconds(1e12, 1e11) for part in parts_of(costs, Work(2048, 128, 12 * networks)))

    assert seconds(20) / seconds(10) == pytest.approx(2, rel=0.03)


def test_reading_beside_workers_overlaps_with_computing() -> None:
    images = ImageCost([12], [0.002], reading=0.003, workers=0, threads=1, cores=4)
    assert images.together_with(1.0, [0], 100) == pytest.approx(1.5)  # one after the other
    beside = ImageCost([12], [0.002], reading=0.003, workers=2, threads=1, cores=4)
    assert beside.together_with(1.0, [0], 100) == pytest.approx(1.0)  # the networks rule
    assert beside.together_with(0.1, [0], 100) == pytest.approx(0.25)  # two workers rule
    crowded = ImageCost([12], [0.002], reading=0.003, workers=2, threads=2, cores=2)
    assert crowded.together_with(1.0, [0], 100) == pytest.approx((0.5 + 2.0) / 2)  # the cores rule
    assert np.isclose(beside.together_with(1.0, [], 100), 1.0)  # stored features need no images
