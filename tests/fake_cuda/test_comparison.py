"""The batch loop of a comparison on fake CUDA tensors: images, networks with hooks, measures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cka_probe.activations.features import as_features
from cka_probe.activations.trace import trace
from cka_probe.errors import NetworkError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject
from cka_probe.probing import batch_loop, probe
from cka_probe.probing.dry_runs import InputVariants
from cka_probe.probing.job import Job
from cka_probe.probing.options import Execution, FeatureOptions, Images
from cka_probe.probing.probe import Probe, Tap
from cka_probe.probing.saved_state import RunState
from cka_probe.runtime.world import World
from tests.distill.networks import SIZE, tiny_cnn, tiny_vit
from tests.fake_cuda.device import CUDA, fake_cuda
from tests.fake_cuda.test_measures import FIRST_BATCH, STEADY
from tests.measures_at_work import start

N, BATCHES = 8, 3
SMALL = Preprocessing(size=(3, SIZE, SIZE))
NETWORKS = {"tiny_cnn": tiny_cnn, "tiny_vit": tiny_vit}

Taps = dict[str, Tap]
Found = list[Counter[tuple[str, str]]]


@pytest.fixture(scope="module")
def taps() -> Taps:
    """Some layers of each network, from dry runs on the CPU."""
    found: Taps = {}
    for name, make in NETWORKS.items():
        traced = trace(make().eval(), torch.randn(3, 3, SIZE, SIZE))
        found[name] = Tap(traced, traced.layers[::4], sum(len(tap.layers) for tap in found.values()))
    return found


def run(
    taps: Taps, monkeypatch: pytest.MonkeyPatch, spec: str = "cka", *, amp: bool = False, pool: str | None = None
) -> Found:
    """What the host reads in each batch."""
    found: Found = []
    labels = [name for name, tap in taps.items() for _ in tap.layers]
    with fake_cuda() as access, torch.no_grad():

        def loaded(*_: Any) -> Iterator[list[Tensor]]:
            for _ in range(BATCHES):
                yield [torch.empty(N, 3, SIZE, SIZE)]

        def progress(done: int, total: int) -> None:
            found.append(Counter(access.found))
            access.found.clear()

        monkeypatch.setattr(batch_loop, "batches", loaded)
        job = Job(
            images=Images(),
            features=FeatureOptions(pool=pool),
            running=Execution(batch_size=N, amp=amp, workers=0),
            world=World(CUDA),
            progress=progress,
        )
        with CUDA:
            subjects = [Subject(name, make().eval(), SMALL) for name, make in NETWORKS.items()]
        measure = start(spec, labels)
        probes = [Probe(subject, taps[subject.name], [measure], job) for subject in subjects]
        samples: Any = range(BATCHES * N)
        inputs = InputVariants(samples, [SMALL.transform()], [0], dict.fromkeys(NETWORKS, 0))
        access.found.clear()
        batch_loop.run_batches(probes, [measure], inputs, job, RunState(None, probes, {}, job.world))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"amp": True}, {"pool": "mean"}, {"spec": "rsa", "pool": "mean"}],
    ids=["cka", "amp", "pooled", "rsa"],
)
def test_a_batch_waits_for_nothing_but_what_is_named(
    taps: Taps, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    first, *later = run(taps, monkeypatch, **options)
    assert set(first) <= FIRST_BATCH | STEADY
    assert len(later) == BATCHES - 1
    for found in later:
        assert set(found) <= STEADY
        assert found["devices.py:finish", "event"] <= len(NETWORKS) + 1  # of each network, and of the measure
        assert found["feature_store.py:update", "stream"] <= 1


@pytest.mark.slow
def test_a_wait_that_is_hidden_in_the_loop_is_found_with_its_place(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(tensor: Tensor, *options: Any) -> Tensor:
        features = as_features(tensor, *options)
        return features * int(features.abs().amax().item() < 1e30)

    monkeypatch.setattr(probe, "as_features", waiting)
    for found in run(taps, monkeypatch):
        assert found["test_comparison.py:waiting", "value"] > 0


@pytest.mark.slow
def test_a_copy_of_the_images_that_is_waited_for_is_found(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    run_probe = Probe.run

    def copying(self: Probe, images: Tensor, number: int = 0, batches: int = 1) -> None:
        images.mean((1, 2, 3)).cpu()
        run_probe(self, images, number, batches)

    monkeypatch.setattr(Probe, "run", copying)
    for found in run(taps, monkeypatch):
        assert found["test_comparison.py:copying", "copy"] == len(NETWORKS)


def test_a_tensor_that_stays_on_the_cpu_is_found(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixing(tensor: Tensor, *options: Any) -> Tensor:
        features = as_features(tensor, *options)
        return features + torch.zeros(features.shape[1])

    monkeypatch.setattr(probe, "as_features", mixing)
    with pytest.raises(NetworkError, match="same device|two different devices"):
        run(taps, monkeypatch)


def test_images_that_stay_on_the_cpu_are_found(taps: Taps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_loop, "on_device", lambda batches, _: batches)
    with pytest.raises(NetworkError, match="device"):
        run(taps, monkeypatch)
