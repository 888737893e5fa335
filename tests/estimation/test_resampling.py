"""What CKA tells beside its values: permutation tests, the curve, and what each example does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import cka_probe as cp
from cka_probe.estimation.estimates import Estimates, Requests, p_values
from cka_probe.estimation.gram import Features
from tests import oracles
from tests.estimation.test_streaming import cut, draw
from tests.measures_at_work import start

SIZES = (12, 12, 9)


def stream(asked: Requests, *, debiased: bool = True) -> Estimates:
    running = start("cka" if debiased else "cka:biased", ["a", "b", "c"], asked)
    first = 0
    for batch in cut(draw(sum(SIZES)), SIZES):
        for index, x in enumerate(batch):
            running.prepare(index, Features(x))
        running.update(first)
        first += len(batch[0])
    return running.compute()


@pytest.mark.parametrize("debiased", [True, False])
def test_the_influence_of_an_example_is_exact(debiased: bool) -> None:
    found = stream(Requests(influence=True), debiased=debiased).influence
    layers = draw(sum(SIZES))
    ends = np.cumsum((0, *SIZES))

    def cka(i: int, j: int, without: int | None) -> float:
        grams: list[list[Any]] = [[], []]
        for side, layer in zip(grams, (layers[i], layers[j]), strict=True):
            for first, last in pairwise(ends.tolist()):
                kept = [row for row in range(first, last) if row != without]
                side.append(oracles.linear_gram(layer[kept]))
        return oracles.minibatch_cka(*grams, debiased=debiased)

    assert found is not None
    assert found.shape == (33, 3, 3)
    for example in (0, 13, 32):
        for i, j in ((0, 1), (1, 2)):
            # RunState in float32: 6e-8 of the products, and of values up to 1.
            assert found[example, i, j] == pytest.approx(cka(i, j, None) - cka(i, j, example), abs=1e-6)
    assert np.abs(found[:, 0, 0]).max() < 1e-6  # a layer is like itself whatever is left out


def test_the_image_that_does_not_belong_is_the_most_influential() -> None:
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[17] = 30.0
    networks = {name: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()) for name in ("one", "two")}
    found = cp.compare(networks, data=images, layers="all", batch_size=20, influence=3)
    assert len(found.influence) == 3
    assert found.influence[0].example == "Tensor/17"
    assert abs(found.influence[0].change) > 2 * abs(found.influence[1].change)
    assert {found.influence[0].row.model, found.influence[0].col.model} == {"one", "two"}


def test_the_curve_of_cka_is_noted_at_the_ends_of_batches() -> None:
    whole = stream(Requests(curve=(10, 20, 33)))
    assert [point.examples for point in whole.curve] == [12, 24, 33]
    np.testing.assert_array_equal(whole.curve[-1].values, whole.values.numpy())
    first = [oracles.linear_gram(x[:12]) for x in draw(33)]
    assert whole.curve[0].values[0, 1] == pytest.approx(oracles.cka(first[0], first[1], debiased=True), abs=1e-10)
    assert np.isnan(whole.curve[0].std_error).all()  # of one batch there is none


def test_permuting_cka_tells_related_layers_from_unrelated_ones() -> None:
    layers = [*draw(96, (5, 8)), torch.randn(96, 6, dtype=torch.float64)]
    running = start("cka", ["a", "b", "c"], Requests((0, 1, 1), permutations=99))
    for number, batch in enumerate(cut(layers, (32, 32, 32))):
        for index, x in enumerate(batch):
            running.prepare(index, Features(x))
        running.update(32 * number)
    found = running.compute()
    assert found.p_value is not None
    assert found.p_value_max is not None
    assert found.p_value[0, 1] == found.p_value_max[0, 1] == 0.01
    assert found.p_value[0, 2] > 0.02
    assert found.details["permutations"] == 99


def test_p_values_are_uniform_where_nothing_is_related() -> None:
    rng = np.random.default_rng(0)
    each, largest = [], []
    for _ in range(400):
        drawn = rng.standard_normal((20, 5, 5))  # the first stands for the value, the others for permutations
        one, corrected = p_values(drawn[0], drawn[1:], (0, 0, 1, 1, 1))
        each.append(one[0, 2])
        block = np.s_[:2, 2:]
        best = np.unravel_index(drawn[0][block].argmax(), (2, 3))
        largest.append((one[block][best], corrected[block][best]))
    uncorrected, corrected = np.array(largest).T
    # Of 400 draws at level 0.2, the share scatters by 0.02.
    assert np.mean(np.array(each) <= 0.2) == pytest.approx(0.2, abs=0.06)
    assert np.mean(uncorrected <= 0.2) > 0.5  # the best of six pairs, taken for a pair of its own
    assert np.mean(corrected <= 0.2) == pytest.approx(0.2, abs=0.06)


def test_what_a_batch_adds_does_not_depend_on_the_batches_before_it() -> None:
    """Whoever has a batch, another process or a later run, shuffles it the same."""
    asked = Requests((0, 1, 1), permutations=19, influence=True)
    batches = dict(zip((0, 12, 24), cut(draw(sum(SIZES)), SIZES), strict=True))
    found = []
    for order in ((0, 12, 24), (24, 0, 12)):
        running = start("cka", ["a", "b", "c"], asked)
        for first in order:
            for index, x in enumerate(batches[first]):
                running.prepare(index, Features(x))
            running.update(first)
        found.append(running.compute())
    one, other = found
    assert one.p_value is not None
    assert one.influence is not None
    assert one.null.numpy() == pytest.approx(other.null.numpy(), abs=1e-12)  # the order of three additions
    np.testing.assert_array_equal(one.p_value, other.p_value)
    np.testing.assert_allclose(one.influence, other.influence, atol=1e-6)  # kept in float32
