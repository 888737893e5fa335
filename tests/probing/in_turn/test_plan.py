"""A plan puts networks together as the budget allows, and says what is the least that does."""

from __future__ import annotations

import re

import pytest

from cka_probe.errors import SpecError
from cka_probe.probing.in_turn.cost import ImageCost, NetworkCost, Work, parse_bytes
from cka_probe.probing.in_turn.plan import Plan, make_plan, timed

MB = 10**6
PROCESS = 100 * MB
NO_IMAGES = ImageCost([0], [0.0])


def network(name: str, weights: int, working: int = 10, seconds: float = 1.0) -> NetworkCost:
    return NetworkCost(name, weights * MB, working * MB, looks=frozenset({0}), seconds=seconds)


def plan_of(costs: list[NetworkCost], budget: int, work: Work | None = None) -> Plan:
    work = work or Work(examples=320, batch=32, layers=4)
    return make_plan(costs, work, NO_IMAGES, resident=PROCESS, budget=budget * MB)


FOUR = [network("a", 50), network("b", 40), network("c", 30), network("d", 20)]


def test_all_networks_run_in_one_pass_where_they_fit() -> None:
    plan = plan_of(FOUR, 400)
    assert plan.groups == [(0, 1, 2, 3)]
    assert plan.disk == 0
    assert plan.peak >= (100 + 140 + 10) * MB


def test_networks_run_in_few_groups_that_each_fit() -> None:
    plan = plan_of(FOUR, 100 + 10 + 70)
    assert plan.groups == [(0, 3), (1, 2)]  # 50 + 20 and 40 + 30
    assert plan.peak <= plan.budget
    assert plan.disk == 4 * 32 * 32 * 4 * 10  # layers, float32 Gram matrices, batches


def test_every_network_runs_once_whatever_the_budget() -> None:
    for budget in range(165, 300, 5):
        plan = plan_of(FOUR, budget)
        assert sorted(index for group in plan.groups for index in group) == [0, 1, 2, 3]
        assert plan.peak <= plan.budget


def test_a_budget_below_any_plan_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(SpecError, match=r"at least .* 'a' takes .*weights 50 MB") as caught:
        plan_of(FOUR, 120)
    least = parse_bytes(re.search(r"at least (.+?) for", str(caught.value))[1])
    assert len(plan_of(FOUR, least // MB + 1).groups) == 4 or plan_of(FOUR, least // MB + 1).peak <= least + MB


def test_sums_that_do_not_fit_are_named() -> None:
    work = Work(examples=10_240, batch=1024, layers=100)  # 100 triangles of 8 MB
    with pytest.raises(SpecError, match=r"the sums over all pairs of layers take .*triangles 8\d\d MB"):
        plan_of(FOUR, 500, work)


def test_one_network_is_never_refused_for_what_only_groups_need() -> None:
    work = Work(examples=320, batch=32, layers=4)
    plan = plan_of([network("a", 50)], 175, work)
    assert plan.groups == [(0,)]
    assert plan.disk == 0


def test_one_network_whose_sums_do_not_fit_beside_it_still_waits_for_them() -> None:
    work = Work(examples=320, batch=128, layers=400)  # triangles of 52 MB
    plan = plan_of([network("a", 50)], 175, work)
    assert plan.groups == [(0,)]
    assert plan.waits
    assert plan.disk == 400 * 128 * 128 * 4 * 320 / 128


def test_seconds_are_those_of_each_pass_and_of_reading_the_images_in_each() -> None:
    images = ImageCost([0], [0.01], reading=0.02)
    plan = timed(plan_of(FOUR, 180), images, together=0.5)
    batches, reading = 10, 32 * 0.03
    weights = 140 * MB / 1e9  # at a gigabyte a second
    assert plan.seconds == pytest.approx(batches * (2 * reading + 4 * 1.0 + 0.5) + weights)
    assert timed(plan_of(FOUR, 400), images, together=0.5).seconds == pytest.approx(
        batches * (reading + 4 * 1.0 + 0.5) + weights
    )


def test_the_plan_is_told_with_its_passes() -> None:
    lines = timed(plan_of(FOUR, 180), NO_IMAGES, 0.5).told()
    assert "2 passes" in lines[0]
    assert "each image is read 2 times" in lines[0]
    assert "of 180 MB at most" in lines[1]
    assert [line for line in lines if line.startswith("Pass")] == ["Pass 1: a, d", "Pass 2: b, c"]


def test_permutations_and_influence_are_counted() -> None:
    plain, more = (
        Work(examples=2048, batch=128, layers=50, permutations=count, influence=bool(count)) for count in (0, 999)
    )
    assert more.sums["permutations"] > 999 * 50**2 * 8
    assert more.sums["influence"] > 2048 * 50**2 * 4
    assert "permutations" not in plain.sums
