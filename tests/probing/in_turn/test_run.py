"""Networks that run one after the other give what they give together, bit for bit; the plan is logged and recorded."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.errors import FeatureError, OutputError, SpecError
from cka_probe.measures.catalogue import MEASURES
from cka_probe.probing.in_turn.memory_plan import Workload
from cka_probe.probing.in_turn.weight_offload import WeightOffload
from cka_probe.results.similarity import Similarity
from cka_probe.runtime import footprint

NETWORKS = ["zoo:cnn", "zoo:vit", "zoo:mlp"]
OPTIONS = {"examples": 100, "batch_size": 24}  # four batches, and a last one of four


@pytest.fixture
def _nothing_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system reports of a process varies; counted alone, memory is the same everywhere."""
    monkeypatch.setattr(footprint, "in_use", lambda device: 1)
    monkeypatch.setattr(footprint, "peak", lambda device: 0)


@pytest.fixture
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two networks fit into memory together."""
    real = Workload.of_pass
    monkeypatch.setattr(
        Workload, "of_pass", lambda self, some: real(self, some) if len(some) == 1 else {"too much": 1 << 50}
    )


def assert_same(one: Similarity, other: Similarity) -> None:
    """Bit for bit."""
    assert one.rows == other.rows
    for part in ("values", "std_error", "null", "p_value", "p_value_max"):
        first, second = getattr(one, part), getattr(other, part)
        assert (first is None and second is None) or np.array_equal(first, second, equal_nan=True), part
    assert one.influence == other.influence
    if one.curve is not None:
        np.testing.assert_array_equal(one.curve.values, other.curve.values)


def passes(similarity: Similarity) -> list[list[str]]:
    return similarity.provenance.plan["passes"]


@pytest.mark.slow
@pytest.mark.usefixtures("_one_at_a_time")
def test_in_turn_is_together_bit_for_bit() -> None:
    options = {
        **OPTIONS, "measures": ["cka", "cka:biased", "cka-rbf", "procrustes"], "permutations": 9, "influence": 3,
        "curve": True,
    }  # fmt: skip
    together = cp.compare(NETWORKS, **options)
    in_turn = cp.compare(NETWORKS, memory="100GB", **options)
    assert passes(in_turn["cka"]) == [["zoo:cnn"], ["zoo:vit"], ["zoo:mlp"]]
    for name in together:
        assert_same(together[name], in_turn[name])
    assert in_turn["cka-rbf"].provenance.others["bandwidths"] == together["cka-rbf"].provenance.others["bandwidths"]


@pytest.mark.slow
@pytest.mark.usefixtures("_one_at_a_time")
def test_views_of_a_network_run_in_one_pass_and_stored_features_with_the_first(tmp_path: Path) -> None:
    options = {**OPTIONS, "views": ["identity", "noise:0.2"]}
    assert_same(
        cp.compare(["zoo:cnn", "zoo:vit"], **options), cp.compare(["zoo:cnn", "zoo:vit"], memory="100GB", **options)
    )
    cp.extract(["zoo:mlp"], tmp_path / "kept", examples=100)
    beside = ["zoo:vit", str(tmp_path / "kept"), "zoo:cnn"]
    in_turn = cp.compare(beside, memory="100GB", **OPTIONS)
    assert passes(in_turn) == [["zoo:vit"], ["zoo:cnn"]]
    assert_same(cp.compare(beside, **OPTIONS), in_turn)


@pytest.mark.slow
def test_with_room_all_run_in_one_pass() -> None:
    roomy = cp.compare(NETWORKS, memory="100GB", **OPTIONS)
    assert passes(roomy) == [NETWORKS]
    assert roomy.provenance.plan["disk_bytes"] == 0
    assert_same(cp.compare(NETWORKS, **OPTIONS), roomy)


@pytest.mark.full
@pytest.mark.usefixtures("_one_at_a_time")
def test_every_measure_is_the_same_in_turn() -> None:
    names, views = [*MEASURES], {"examples": 64, "batch_size": 16, "layers": "stages", "permutations": 2}
    for asked in ({"models": ["zoo:cnn", "zoo:cnn-2"]}, {"models": ["zoo:cnn"], "views": "identity,gray"}):
        options: dict[str, Any] = {**views, **asked}
        together = cp.compare(measures=names, **options)
        in_turn = cp.compare(measures=names, memory="100GB", **options)
        for name in names:
            assert_same(together[name], in_turn[name])


def test_stored_features_alone_need_no_images() -> None:
    x = {"x": np.random.default_rng(0).normal(size=(60, 5)), "y": np.random.default_rng(1).normal(size=(60, 7))}
    assert_same(cp.compare(x, batch_size=16), cp.compare(x, batch_size=16, memory="100GB"))


def test_the_plan_is_logged_before_the_run_and_recorded_with_the_measured_peak(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logged: list[bool] = []

    def progress(done: int, total: int) -> None:
        logged.append("Plan: 1 network in 1 pass" in caplog.text)

    with caplog.at_level(logging.INFO, "cka_probe"):
        found = cp.compare(["zoo:cnn"], memory="100GB", progress=progress, **OPTIONS)
    assert logged
    assert all(logged)
    plan = found.provenance.plan
    assert set(plan) == {"passes", "budget_bytes", "disk_bytes", "memory", "estimated", "measured"}
    if footprint.peak(torch.device("cpu")):
        assert plan["estimated"]["peak_bytes"] == pytest.approx(plan["measured"]["peak_bytes"], rel=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_at_a_time")
def test_progress_counts_the_images_of_all_passes() -> None:
    seen: list[tuple[int, int]] = []
    found = cp.compare(["zoo:cnn", "zoo:vit"], memory="100GB", progress=lambda *step: seen.append(step), **OPTIONS)
    assert len(passes(found)) == 2
    assert seen[0] == (24, 200)
    assert seen[-1] == (200, 200)
    assert seen == sorted(seen)


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_resident")
def test_a_budget_that_is_too_small_says_the_least_that_would_do() -> None:
    with pytest.raises(SpecError, match=r"--memory must be at least .* for batches of 24, but is 1 MB"):
        cp.compare(NETWORKS, memory="1MB", **OPTIONS)
    with pytest.raises(SpecError, match="such as 8GB"):
        cp.compare(NETWORKS, memory="much", **OPTIONS)


def test_a_wrong_spec_is_reported_before_any_network_runs() -> None:
    def progress(done: int, total: int) -> None:
        raise AssertionError("ran")

    with pytest.raises(SpecError, match="zoo:cmn"):
        cp.compare(["zoo:cnn", "zoo:cmn"], memory="100GB", progress=progress, **OPTIONS)


class Sick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 0


@pytest.mark.usefixtures("_nothing_resident")
def test_a_broken_layer_is_reported_when_it_is_seen_and_not_after_all_passes() -> None:
    network = nn.Sequential(Sick(), nn.Identity())
    with pytest.raises(FeatureError, match=r"layer '0' of 'sick' hold NaN or infinity"):
        cp.compare({"sick": network}, data=torch.randn(64, 3, 8, 8), layers="all", batch_size=16, memory="100GB")


def test_networks_are_given_back_as_they_came() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cp.compare({"net": network}, data=torch.randn(64, 3, 8, 8), layers="all", batch_size=16, memory="100GB")
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_offloaded_network_keeps_its_shapes_and_gets_its_weights_back() -> None:
    shared = nn.Linear(6, 6)
    network = nn.Sequential(shared, nn.BatchNorm1d(6), shared).eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = network(x)
        offload = WeightOffload()
        offload.offload(network)
        assert network[0].weight.shape == (6, 6)
        assert network[0].weight.untyped_storage().nbytes() == 4
        for _ in range(2):
            with offload.loaded(network):
                assert torch.equal(network(x), expected)
        assert network[0].weight.untyped_storage().nbytes() == 4
        other = nn.Linear(6, 6)
        with offload.loaded(other):  # was never offloaded
            other(x)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--scratch"):
        cp.compare(["zoo:cnn"], memory="100GB", scratch=tmp_path / "file" / "below", **OPTIONS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
def test_on_a_gpu_the_budget_is_that_of_the_gpu() -> None:
    together = cp.compare(NETWORKS, device="cuda", **OPTIONS)
    with pytest.raises(SpecError, match="must be at least") as refused:
        cp.compare(NETWORKS, device="cuda", memory="1MB", **OPTIONS)
    least = re.search(r"at least ([0-9.]+ [kMG]B)", str(refused.value))[1].replace(" ", "")
    in_turn = cp.compare(NETWORKS, device="cuda", memory=least, **OPTIONS)
    np.testing.assert_allclose(in_turn.values, together.values, atol=1e-5)  # kernels may be chosen anew each time
    kept = in_turn.provenance.plan
    assert kept["estimated"]["peak_bytes"] <= kept["budget_bytes"]
