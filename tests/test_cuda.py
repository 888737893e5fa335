"""What a GPU does otherwise than a CPU: tensor cores, copies ahead, and looks at what it found a batch later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cka_probe as cp
from cka_probe.distill.config import Training
from cka_probe.distill.methods.fitnet import FitNet
from cka_probe.distill.training.train import distill
from cka_probe.errors import FeatureError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.kernels import centered_product, u_center, uncentered_product
from cka_probe.runtime.devices import DeferredRead, on_device
from tests import oracles
from tests.distill.training.test_train import killed_after, weights
from tests.measures_at_work import start

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU."),
]

WIDE = 50_000


def related(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(64, 6, generator=generator)
    sides = (
        common @ torch.randn(6, WIDE, generator=generator) + 3 * torch.randn(64, WIDE, generator=generator) + 1
        for _ in "xy"
    )
    first, second = (side.to(dtype) for side in sides)
    return first, second


@pytest.mark.parametrize("product", [uncentered_product, centered_product])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_tensor_cores_leave_cka_within_a_hundred_thousandth(product, dtype: torch.dtype) -> None:
    x, y = related(0, dtype)
    made = [product(side.cuda()) for side in (x, y)]
    assert all(one.is_precise() and one.gram.dtype == torch.float32 for one in made)
    k, l = (u_center(one.gram.double()) for one in made)
    exact = oracles.cka(oracles.linear_gram(x.double()), oracles.linear_gram(y.double()), debiased=True)
    assert abs(((k * l).sum() / (k.norm() * l.norm())).item() - exact) < 1e-5


def test_batches_are_copied_ahead_in_their_order() -> None:
    batches = [(number, [torch.full((4, 1000), float(number)).pin_memory()]) for number in range(5)]
    seen = [(key, tensors[0].sum().item()) for key, tensors in on_device(batches, torch.device("cuda"))]
    assert seen == [(number, 4000.0 * number) for number in range(5)]


def test_what_a_gpu_found_is_seen_with_the_next_batch() -> None:
    later, seen = DeferredRead(), []
    for value in (1.0, 2.0):
        later.read(torch.tensor([value], device="cuda"), seen.extend)
    assert seen == [1.0]
    later.finish()
    assert seen == [1.0, 2.0]


def test_features_that_are_not_finite_are_told_before_the_end() -> None:
    measure = start("cka", ["a layer"])
    measure.prepare(0, Features(torch.full((8, 5), torch.nan, device="cuda"), way="uncentered", wait=False))
    measure.update(0)
    with pytest.raises(FeatureError, match="a layer hold NaN"):
        measure.compute()


@pytest.mark.parametrize("measures", [("cka", "cka-rbf"), ("rsa", "mutual-knn", "procrustes")])
def test_measures_are_those_of_a_cpu(measures: tuple[str, ...]) -> None:
    there, here = (
        cp.compare(["zoo:cnn", "zoo:vit"], measures=measures, examples=256, batch_size=64, device=device)
        for device in ("cuda", "cpu")
    )
    for name in measures:
        # The networks themselves differ by round-off, TF32 convolutions among it, and neighbours change places by it.
        assert np.abs(there[name].values - here[name].values).max() < (0.02 if name == "mutual-knn" else 2e-3)


def test_amp_leaves_the_sums_in_float64() -> None:
    found = cp.compare(["zoo:cnn", "zoo:vit"], examples=256, batch_size=64, device="cuda", amp=True)
    exact = cp.compare(["zoo:cnn", "zoo:vit"], examples=256, batch_size=64, device="cpu")
    assert found.values.dtype == np.float64
    assert np.abs(found.values - exact.values).max() < 0.02  # activations of 8 bits


def test_a_short_last_batch_is_as_precise_as_the_others(caplog) -> None:
    options = {"examples": 133, "batch_size": 64}
    found, exact = (cp.compare(["zoo:cnn", "zoo:vit"], device=device, **options) for device in ("cuda", "cpu"))
    assert "less precise" not in caplog.text
    assert np.abs(found.values - exact.values).max() < 2e-3


def test_fp16_trains_and_resumes(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Training(
        student="zoo:cnn@random", teacher="zoo:cnn", method=FitNet(stages="last"), data=str(colours), image_size=32,
        validation=0, batch_size=36, epochs=2, workers=0, clip=1.0, ema=0.9, fp16=True, device="cuda",
    )  # fmt: skip
    whole = distill(config, tmp_path / "whole")
    killed_after(3, monkeypatch, config, tmp_path / "killed")  # an epoch has two steps
    saved = torch.load(tmp_path / "killed" / ".cka-probe" / "last.ckpt", weights_only=True, map_location="cpu")
    assert saved["updates"] == 2
    skipped = saved["scaler"]["scale"] < 2**16
    assert skipped or saved["scaler"]["_growth_tracker"] == 2
    resumed = distill(config, tmp_path / "killed", resume=True)
    assert np.isfinite([row["loss"] for row in whole.metrics]).all()
    assert [row["loss"] for row in resumed.metrics] == pytest.approx([row["loss"] for row in whole.metrics], rel=1e-2)
    for name, tensor in weights(tmp_path / "whole").items():
        # Sums on a GPU are in no fixed order, and Adam makes a step of any gradient.
        torch.testing.assert_close(tensor, weights(tmp_path / "killed")[name], rtol=1e-2, atol=2e-3, msg=name)
