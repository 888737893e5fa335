"""Parts of CRD, RSD and FBT against the formulas of their papers, and gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cka_probe.distill import losses
from cka_probe.distill.memory_bank import MemoryBank
from cka_probe.distill.methods.rsd import RSD, _projector
from tests.distill import paper_oracles as papers

Array = np.ndarray[Any, Any]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(tensor: Tensor) -> Array:
    return np.array(tensor.detach().double().numpy())


def assert_gradient(
    gradient: Tensor, value: Callable[[Array], float], at: Tensor, rel: float = 1e-5, atol: float = 1e-7
) -> None:
    """By central differences, whose error is about step² and round-off over the step: 1e-9 here."""
    x, step = double(at), 1e-5
    for place in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[place] = step
        slope = (value(x + moved) - value(x - moved)) / (2 * step)
        assert gradient[place].item() == pytest.approx(slope, rel=rel, abs=atol)


def embed(layer: nn.Linear, features: Tensor) -> Array:
    return papers.l2_normalized(papers.linear(double(features), (double(layer.weight), double(layer.bias))))


def test_two_batches_of_a_memory_bank_are_those_of_the_paper() -> None:
    """Both directions, Z of the first batch for both, and the memory as it was before the batch."""
    torch.manual_seed(0)
    bank = MemoryBank(5, 3, images=12, seed=0)
    memories = {name: double(bank.get_buffer(name)) for name in ("memory", "teacher_memory")}
    z: dict[str, float] = {}
    for batch, own in enumerate((torch.tensor([3, 0, 11]), torch.tensor([5, 3, 8]))):
        drawn = bank._rows(own)[:, 1:].numpy()
        assert drawn.shape == (3, 11)
        assert not (drawn == own[:, None].numpy()).any()
        features, teacher = noise(20 + batch, 3, 5).float().requires_grad_(), noise(30 + batch, 3, 3).float()
        embedded = {"crd": embed(bank.embed, features), "crd_teacher": embed(bank.embed_teacher, teacher)}
        found = bank(features, teacher, own)  # the memory moves
        (gradient,) = torch.autograd.grad(found["crd"], features)
        for name, other in (("crd", "teacher_memory"), ("crd_teacher", "memory")):
            rows = (embedded[name], memories[other], own.numpy(), drawn)
            z.setdefault(name, papers.crd_z(*rows))
            assert found[name].item() == pytest.approx(papers.crd(*rows, z=z[name]), rel=2e-5)  # float32

        def student(x: Array, own: Tensor = own, drawn: Array = drawn) -> float:
            embedding = embed(bank.embed, torch.from_numpy(x))
            return papers.crd(embedding, memories["teacher_memory"], own.numpy(), drawn, z=z["crd"])

        assert_gradient(gradient, student, features, rel=1e-3, atol=1e-4)
        for name, anchors in (("memory", "crd"), ("teacher_memory", "crd_teacher")):
            memories[name] = papers.crd_memory_update(memories[name], embedded[anchors], own.numpy())
            np.testing.assert_allclose(bank.get_buffer(name).numpy(), memories[name], atol=1e-6)


def test_rsd_through_its_projector() -> None:
    torch.manual_seed(0)
    projector = _projector(3, 4).double()
    first, norm, _, last = projector
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * noise(40, 6))
        norm.bias.copy_(0.1 * noise(41, 6))
    features, teacher = noise(42, 5, 3).requires_grad_(), 3 * noise(43, 5, 4) + 1
    a, gain, shift, b = (double(tensor) for tensor in (first.weight, norm.weight, norm.bias, last.weight))

    def value(x: Array) -> float:
        return papers.rsd(papers.rsd_projector(x, a, (gain, shift), b), teacher.numpy(), kappa=RSD().kappa)

    loss = losses.rsd_loss(projector(features), teacher, kappa=RSD().kappa)
    assert loss.item() == pytest.approx(value(double(features)), rel=1e-10)
    (gradient,) = torch.autograd.grad(loss, features)
    assert_gradient(gradient, value, features)


def test_info_nce_for_queries_and_temperature() -> None:
    queries, keys = noise(50, 4, 3).requires_grad_(), noise(51, 4, 3)
    log_temperature = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
    loss = losses.info_nce_loss(queries, keys, log_temperature=log_temperature)
    assert loss.item() == pytest.approx(papers.info_nce(double(queries), keys.numpy(), 0.2), rel=2e-5)
    of_queries, of_temperature = torch.autograd.grad(loss, (queries, log_temperature))
    # The loss is computed in float32 whatever its arguments are.
    assert_gradient(of_queries, lambda x: papers.info_nce(x, keys.numpy(), 0.2), queries, rel=1e-4, atol=1e-6)

    def of(x: Array) -> float:
        return papers.info_nce(double(queries), keys.numpy(), math.exp(x[0]))

    assert_gradient(of_temperature[None], of, log_temperature[None], rel=1e-4)
