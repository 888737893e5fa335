"""A plan puts networks together as the budget allows, and an error gives the least budget that does."""

from __future__ import annotations

import re

import pytest
import torch

from cka_probe.errors import SpecError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.probing.in_turn.memory_plan import NetworkMemory, Plan, Workload, make_plan
from cka_probe.runtime.sizes import format_bytes, parse_bytes
from tests.measures_at_work import start

MB = 10**6


def network(name: str, weights: int, peak: int = 10, layers: int = 1) -> NetworkMemory:
    return NetworkMemory(name, weights * MB, peak * MB, layers, frozenset({0}))


def workload(examples: int = 320, batch: int = 32, **more: int) -> Workload:
    return Workload(100 * MB, [0], examples, batch, **more)


def plan_of(networks: list[NetworkMemory], budget: int, work: Workload | None = None) -> Plan:
    return make_plan(networks, work or workload(), budget * MB)


FOUR = [network("a", 50), network("b", 40), network("c", 30), network("d", 20)]


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


def test_sizes_are_printed_with_three_digits() -> None:
    assert [format_bytes(size) for size in (1_234_567_890, 123_456_789, 999_900_000, 12_345)] == [
        "1.23 GB", "123 MB", "1 GB", "12 kB",
    ]  # fmt: skip


def test_all_networks_run_in_one_pass_if_they_fit() -> None:
    plan = plan_of(FOUR, 400)
    assert plan.passes == ((0, 1, 2, 3),)
    assert not plan.stored
    assert plan.disk == 0
    assert plan.peak >= (100 + 140 + 10) * MB


def test_networks_run_in_few_groups_that_each_fit() -> None:
    plan = plan_of(FOUR, 100 + 10 + 70 + 1)
    assert plan.passes == ((0, 3), (1, 2))  # 50 + 20 and 40 + 30
    assert plan.peak <= plan.budget
    assert plan.disk == 4 * 32 * 32 * 4 * 10  # layers, float32 Gram matrices, batches


def test_every_network_runs_once_whatever_the_budget() -> None:
    for budget in range(165, 300, 5):
        plan = plan_of(FOUR, budget)
        assert sorted(index for group in plan.passes for index in group) == [0, 1, 2, 3]
        assert plan.peak <= plan.budget


def test_images_are_counted_once_for_each_input_variant() -> None:
    work = Workload(0, [MB, 5 * MB], 64, 32, gram_bytes=0, streaming=0)
    same = [NetworkMemory(name, 0, 0, 1, frozenset({0})) for name in "ab"]
    other = NetworkMemory("c", 0, 0, 1, frozenset({1}))
    assert work.of_pass(same)["images"] == 2 * MB  # the batch in use and the next one
    assert work.of_pass([*same, other])["images"] == 2 * 6 * MB


def test_a_budget_below_any_plan_is_refused_with_the_least_that_does() -> None:
    with pytest.raises(SpecError, match=r"at least .* but is 120 MB: a needs that much .*weights 50 MB") as caught:
        plan_of(FOUR, 120)
    least = parse_bytes(re.search(r"at least (.+?) for", str(caught.value))[1])
    plan = make_plan(FOUR, workload(), least)
    assert plan.peak <= least


def test_sums_that_do_not_fit_are_named() -> None:
    layers = [network("a", 50, layers=50), network("b", 50, layers=50)]
    with pytest.raises(SpecError, match=r"the product of all pairs needs that much .*triangles 8\d\d MB"):
        plan_of(layers, 700, workload(examples=10_240, batch=1024))  # 100 triangles of 8 MB


def test_one_network_is_never_refused_for_what_only_groups_need() -> None:
    plan = plan_of([network("a", 50)], 175)
    assert plan.passes == ((0,),)
    assert not plan.stored


def test_one_network_whose_sums_do_not_fit_beside_it_still_stores_its_gram_matrices() -> None:
    plan = plan_of([network("a", 50, layers=400)], 190, workload(batch=128))  # triangles of 52 MB
    assert plan.passes == ((0,),)
    assert plan.stored
    assert plan.disk == 400 * 128 * 4 * 320


def test_the_plan_is_described_with_its_passes() -> None:
    lines = plan_of(FOUR, 181).describe()
    assert lines[0] == "Plan: 4 networks in 2 passes over the images."
    assert "of 181 MB at most (process 100 MB, weights 70 MB, activations 10 MB)" in lines[1]
    assert lines[2:] == ["Pass 1: a, d", "Pass 2: b, c", "Gram matrices in a file: 164 kB."]
    assert set(plan_of(FOUR, 181).record()) == {"passes", "budget_bytes", "disk_bytes", "memory", "estimated"}


def test_permutations_and_influence_are_counted() -> None:
    plain, more = (
        workload(examples=2048, batch=128, permutations=count, influence=bool(count)).sums(50) for count in (0, 999)
    )
    assert more["permutations"] > 999 * 50**2 * 8
    assert more["influence"] > 2048 * 50**2 * 4
    assert set(plain) == {"triangles"}


def test_the_sums_of_a_measure_are_what_it_holds() -> None:
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
    counted = workload(n, n).sums(layers)["triangles"]
    assert held <= counted <= 1.5 * held + (1 << 22)  # a chunk is at most 4 MiB; indices are made anew in each batch
