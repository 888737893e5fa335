"""The losses against the papers' formulas in float64, and the identities that tie them together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cka_probe.distill import losses
from tests.distill import oracles
from tests.distill import paper_oracles as papers

N, C = 6, 5
CLOSE = {"rel": 1e-10}  # float64 on both sides


def logits(seed: int, n: int = N, c: int = C) -> Tensor:
    return 3 * torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = logits(1), logits(2)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
NUMBERS = LABELS.numpy()
ARRAYS = STUDENT.numpy(), TEACHER.numpy()


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("gamma", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ofa_is_the_formula(form: losses.Enhancement, gamma: float, temperature: float) -> None:
    value = losses.ofa_loss(STUDENT, TEACHER, LABELS, gamma=gamma, temperature=temperature, form=form)
    expected = papers.ofa(*ARRAYS, NUMBERS, gamma=gamma, temperature=temperature, form=form)
    assert value.item() == pytest.approx(expected, **CLOSE)


def test_ofa_of_one_example_by_hand() -> None:
    """With p_t = (2/3, 1/3), p_s = (1/2, 1/2) and γ = 2 the weights are (5/3)² - 1 and (1/3)², or 1/3 in the paper."""
    student, teacher = torch.zeros(1, 2).double(), torch.tensor([[2.0, 1.0]]).double().log()
    target = torch.tensor([0])
    assert losses.ofa_loss(student, teacher, target, gamma=2).item() == pytest.approx(17 / 9 * np.log(2), **CLOSE)
    paper = losses.ofa_loss(student, teacher, target, gamma=2, form="paper").item()
    assert paper == pytest.approx((16 / 9 + 1 / 3) * np.log(2), **CLOSE)


def test_ofa_at_gamma_1_has_the_gradient_of_kd_without_its_square() -> None:
    student = STUDENT.clone().requires_grad_()
    (first,) = torch.autograd.grad(losses.ofa_loss(student, TEACHER, LABELS, temperature=3), student)
    (second,) = torch.autograd.grad(losses.kd_loss(student, TEACHER, temperature=3) / 9, student)
    torch.testing.assert_close(first, second)


def test_a_soft_target_counts_by_its_largest_class() -> None:
    soft = torch.full((N, C), 0.1).double().scatter_(1, LABELS[:, None], 0.6)
    for loss in (losses.ofa_loss, losses.dkd_loss):
        torch.testing.assert_close(loss(STUDENT, TEACHER, soft), loss(STUDENT, TEACHER, LABELS))


def test_classification_loss_of_a_soft_target_is_that_of_its_indices() -> None:
    hard = torch.nn.functional.one_hot(LABELS, C).double()
    torch.testing.assert_close(losses.classification_loss(STUDENT, hard), losses.classification_loss(STUDENT, LABELS))
    smooth = 0.9 * hard + 0.1 / C
    torch.testing.assert_close(
        losses.classification_loss(STUDENT, smooth), losses.classification_loss(STUDENT, LABELS, 0.1)
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_dkd_and_dist_are_the_formulas(temperature: float) -> None:
    kd = losses.kd_loss(STUDENT, TEACHER, temperature=temperature)
    assert kd.item() == pytest.approx(papers.kd(*ARRAYS, temperature), **CLOSE)
    dkd = losses.dkd_loss(STUDENT, TEACHER, LABELS, alpha=1.5, beta=8, temperature=temperature)
    expected = papers.dkd(*ARRAYS, NUMBERS, alpha=1.5, beta=8, temperature=temperature)
    assert dkd.item() == pytest.approx(expected, **CLOSE)
    dist = losses.dist_loss(STUDENT, TEACHER, beta=2, gamma=3, temperature=temperature)
    expected = temperature**2 * papers.dist(*ARRAYS, beta=2, gamma=3, temperature=temperature)  # the square: its code
    assert dist.item() == pytest.approx(expected, rel=1e-8)  # torch's eps of 1e-8


def test_dkd_with_the_teacher_s_own_weight_is_kd() -> None:
    """KD = TCKD + (1 - p_t,target) · NCKD, example by example (Zhao et al. 2022, equation 5)."""
    for z_s, z_t, label in zip(STUDENT.split(1), TEACHER.split(1), LABELS.split(1), strict=True):
        weight = 1 - z_t.softmax(1)[0, label.item()].item()
        dkd = losses.dkd_loss(z_s, z_t, label, alpha=1, beta=weight)
        torch.testing.assert_close(dkd, losses.kd_loss(z_s, z_t))


def test_cc_and_rkd_are_the_formulas_for_features_of_different_widths() -> None:
    student, teacher = logits(3, N, 7), logits(4, N, 3)
    arrays = student.numpy(), teacher.numpy()
    assert losses.cc_loss(student, teacher).item() == pytest.approx(oracles.cc(*arrays, 0.4, 2), **CLOSE)
    assert losses.rkd_distance_loss(student, teacher).item() == pytest.approx(oracles.rkd_distance(*arrays), **CLOSE)
    assert losses.rkd_angle_loss(student, teacher).item() == pytest.approx(oracles.rkd_angle(*arrays), **CLOSE)


def test_relational_losses_do_not_see_rotation_and_scale_but_see_noise() -> None:
    features = logits(5, N, 4)
    rotation, _ = torch.linalg.qr(logits(6, 4, 4))
    for loss in (losses.cc_loss, losses.rkd_distance_loss, losses.rkd_angle_loss):
        assert loss(3 * features @ rotation, features).item() == pytest.approx(0, abs=1e-15)
        assert loss(logits(7, N, 4), features).item() > 1e-3


def test_relational_losses_have_finite_gradients_where_two_images_are_the_same() -> None:
    features = logits(5, N, 4)
    features[1] = features[0]
    features.requires_grad_()
    for loss in (losses.cc_loss, losses.rkd_distance_loss, losses.rkd_angle_loss):
        (gradient,) = torch.autograd.grad(loss(features, logits(8, N, 3)), features)
        assert gradient.abs().max() < 10


def test_an_image_whose_features_are_all_0_does_not_decide_the_step() -> None:
    features = logits(5, N, 4)
    features[1] = 0
    features.requires_grad_()
    nce = losses.info_nce_loss(features, logits(8, N, 4), log_temperature=torch.tensor(0.0))
    for value in (nce, losses.cc_loss(features, logits(8, N, 3))):
        (gradient,) = torch.autograd.grad(value, features)
        assert gradient.abs().max() < 10
    x = logits(6, N, 4)
    assert torch.equal(losses.unit_length(x), torch.nn.functional.normalize(x, dim=1))


def crd(embedding: np.ndarray, memory: np.ndarray, images: int, first: np.ndarray | None = None) -> float:
    """The paper's loss for rows (n, d) and their own and drawn entries (n, 1 + N, d) of a memory of ``images`` rows.

    Z is that of the authors' program, from the rows themselves or those of the first batch.
    """
    n, columns, width = memory.shape
    whole = np.zeros((images, width))
    whole[: n * columns] = memory.reshape(-1, width)
    indices = np.arange(n * columns).reshape(n, columns)
    own, drawn = indices[:, 0], indices[:, 1:]
    z = papers.crd_z(embedding if first is None else first, whole, own, drawn, tau=0.3)
    return papers.crd(embedding, whole, own, drawn, tau=0.3, z=z)


def test_crd_is_the_formula() -> None:
    unit = torch.nn.functional.normalize
    embedding = unit(logits(9, N, 8), dim=1)
    memory = unit(logits(10, N * 12, 8), dim=1).view(N, 12, 8)
    cosines = torch.einsum("nd,nkd->nk", embedding, memory)
    own = losses.crd_log_mean(cosines, temperature=0.3)
    value = losses.crd_loss(cosines, own, temperature=0.3)
    for images in (100, 50_000):  # which cancels
        assert value.item() == pytest.approx(crd(embedding.numpy(), memory.numpy(), images), **CLOSE)
    first = unit(logits(11, N, 8), dim=1)
    before = losses.crd_log_mean(torch.einsum("nd,nkd->nk", first, memory), temperature=0.3)
    value = losses.crd_loss(cosines, before, temperature=0.3)
    expected = crd(embedding.numpy(), memory.numpy(), 100, first.numpy())
    assert value.item() == pytest.approx(expected, **CLOSE)


def test_crd_has_the_gradient_of_the_formula_with_what_it_divides_by_fixed() -> None:
    unit = torch.nn.functional.normalize
    embedding = unit(logits(30, 3, 4), dim=1).requires_grad_()
    memory = unit(logits(31, 3 * 6, 4), dim=1).view(3, 6, 4)
    first = unit(logits(32, 3, 4), dim=1)
    before = losses.crd_log_mean(torch.einsum("nd,nkd->nk", first, memory), temperature=0.3)
    cosines = torch.einsum("nd,nkd->nk", embedding, memory)
    (gradient,) = torch.autograd.grad(losses.crd_loss(cosines, before, temperature=0.3), embedding)
    step, x = 1e-6, embedding.detach().numpy()
    for place in np.ndindex(*x.shape):
        moved = np.zeros_like(x)
        moved[place] = step
        high, low = (crd(x + sign * moved, memory.numpy(), 50, first.numpy()) for sign in (1, -1))
        assert gradient[place].item() == pytest.approx((high - low) / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.slow
def test_crd_starts_where_noise_contrastive_estimation_does_and_half_of_its_gradient_is_the_positives() -> None:
    """Random unit vectors: log(N + 1) of the positive, 1 of all negatives, and what the spread of e^{x·y/τ} adds."""
    generator = torch.Generator().manual_seed(0)
    embedding, memory = (
        torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
        for shape in ((8, 128), (8, 1 + 16_384, 128))
    )
    cosines = torch.einsum("nd,nkd->nk", embedding, memory).requires_grad_()
    loss = losses.crd_loss(cosines, losses.crd_log_mean(cosines))
    assert loss.item() == pytest.approx(11.5, abs=0.7)  # a positive's cosine scatters by 1/√128, over τ by 1.3
    (gradient,) = torch.autograd.grad(loss, cosines)
    share = gradient[:, 0].abs().sum() / gradient.abs().sum()
    assert share.item() == pytest.approx(0.5, abs=0.05)


def test_crd_does_not_overflow_at_small_temperatures_in_float32() -> None:
    ones = torch.ones(N, 4)
    assert losses.crd_loss(ones, losses.crd_log_mean(ones, temperature=0.005), temperature=0.005).isfinite()


def test_rsd_is_the_formula() -> None:
    student, teacher = logits(12, N, 4), logits(13, N, 4)
    expected = papers.rsd(student.numpy(), teacher.numpy(), kappa=0.3)
    assert losses.rsd_loss(student, teacher, kappa=0.3).item() == pytest.approx(expected, **CLOSE)


def test_rsd_vanishes_for_uncorrelated_features_that_are_the_teacher_s_own_up_to_scale_and_shift() -> None:
    columns, _ = torch.linalg.qr(logits(14, 32, 5) - logits(14, 32, 5).mean(0))
    same, mixed = 2 * columns + 7, columns @ torch.linalg.qr(logits(15, 5, 5))[0]
    assert losses.rsd_loss(same, columns).item() == pytest.approx(0, abs=1e-6)  # 1e-5 beside deviations of 0.2
    assert losses.rsd_loss(-same, columns).item() == pytest.approx(5 * 4, rel=1e-3)
    assert losses.rsd_loss(mixed, columns).item() > 0.1


def test_rsd_has_the_gradient_of_finite_differences_and_a_finite_one_where_a_feature_is_constant() -> None:
    student, teacher = logits(16, N, 4).requires_grad_(), logits(17, N, 4)
    assert torch.autograd.gradcheck(lambda x: losses.rsd_loss(x, teacher, kappa=0.3), student)
    constant = student.detach().clone()
    constant[:, 1] = 0.1
    for x, y in ((constant.requires_grad_(), teacher), (student, constant.detach())):
        (gradient,) = torch.autograd.grad(losses.rsd_loss(x, y), x)
        assert gradient.isfinite().all()


def test_rsd_of_half_precision_networks_is_computed_in_float32() -> None:
    student, teacher = logits(18, 64, 8).float(), logits(19, 64, 8).float()
    exact = losses.rsd_loss(student.double(), teacher.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.rsd_loss(student, teacher).item() == pytest.approx(exact, rel=1e-5)


def test_standardized_logits_are_z_scores_of_each_row() -> None:
    z = losses.standardized_logits(STUDENT).numpy()
    np.testing.assert_allclose(z, papers.standardize(ARRAYS[0]), rtol=1e-12)
    moved = STUDENT * logits(20, N, 1).exp() + 100 * logits(21, N, 1)
    torch.testing.assert_close(losses.standardized_logits(moved), losses.standardized_logits(STUDENT))


def test_a_student_at_another_scale_has_no_loss_between_standardized_logits() -> None:
    student, teacher = losses.standardized_logits(5 * TEACHER - 3), losses.standardized_logits(TEACHER)
    assert losses.kd_loss(student, teacher, temperature=2).item() == pytest.approx(0, abs=1e-12)
    assert losses.dkd_loss(student, teacher, LABELS, temperature=2).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_of_standardized_logits_have_the_gradient_of_finite_differences(temperature: float) -> None:
    z, teacher = losses.standardized_logits, losses.standardized_logits(TEACHER)
    for loss in (
        lambda x: losses.kd_loss(z(x), teacher, temperature=temperature),
        lambda x: losses.dkd_loss(z(x), teacher, LABELS, temperature=temperature),
        lambda x: losses.ofa_loss(z(x), teacher, LABELS, gamma=1.3, temperature=temperature),
    ):
        assert torch.autograd.gradcheck(loss, STUDENT.clone().requires_grad_())


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, -1e4])
def test_equal_logits_have_z_scores_of_zero_and_a_moderate_gradient(value: float) -> None:
    """The mean of 0.1, 1000 times, differs from 0.1 in float32."""
    student = torch.full((2, 1000), value).requires_grad_()
    teacher = torch.randn(2, 1000, generator=torch.Generator().manual_seed(22))
    z = losses.standardized_logits(student)
    assert not z.any()
    (gradient,) = torch.autograd.grad(losses.kd_loss(z, losses.standardized_logits(teacher)), student)
    assert 0 < gradient.abs().max() < 1
    assert not losses.standardized_logits(torch.zeros(2, 1)).any()  # of one class


@pytest.mark.parametrize("loss", [losses.kd_loss, losses.dist_loss, losses.cc_loss, losses.rkd_distance_loss])
def test_a_student_that_is_its_teacher_has_no_loss(loss: object) -> None:
    assert loss(TEACHER, TEACHER).item() == pytest.approx(0, abs=1e-9)  # type: ignore[operator]
