"""The oracles against values derived by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.distill import paper_oracles as oracles

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 6, 5))
LABELS = np.array([0, 1, 2, 3, 4, 0])
CLOSE = {"rel": 1e-12, "abs": 1e-12}  # a few dozen float64 operations


def test_cross_entropy_of_uniform_logits_is_log_k_whatever_the_smoothing() -> None:
    for smoothing in (0.0, 0.1, 1.0):
        assert oracles.cross_entropy(np.zeros((6, 5)), LABELS, smoothing) == pytest.approx(math.log(5), **CLOSE)


def test_cross_entropy_of_two_classes_is_softplus() -> None:
    z = np.array([[0.0, 2.0]])  # p = σ(2) for class 1
    assert oracles.cross_entropy(z, np.array([1])) == pytest.approx(math.log1p(math.exp(-2)), **CLOSE)
    smoothed = oracles.cross_entropy(z, np.array([1]), smoothing=0.2)
    assert smoothed == pytest.approx(0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)), **CLOSE)


def test_kd_dkd_and_dist_are_0_between_equal_logits() -> None:
    assert oracles.kd(STUDENT, STUDENT + 3, 4.0) == pytest.approx(0, abs=1e-12)
    assert oracles.dkd(STUDENT, STUDENT + 3, LABELS, temperature=4.0) == pytest.approx(0, abs=1e-12)
    assert oracles.dist(STUDENT, STUDENT + 3) == pytest.approx(0, abs=1e-12)


def test_kd_of_two_classes() -> None:
    z_s, z_t = np.array([[0.0, 0.0]]), np.array([[0.0, 2 * math.log(3)]])  # at T = 2: p_t = (1/4, 3/4), p_s = 1/2
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert oracles.kd(z_s, z_t, 2.0) == pytest.approx(expected, **CLOSE)


def test_dkd_of_two_classes_has_no_rest_and_is_kd() -> None:
    labels = LABELS % 2
    for beta in (0.0, 8.0):
        value = oracles.dkd(STUDENT[:, :2], TEACHER[:, :2], labels, beta=beta, temperature=2.0)
        assert value == pytest.approx(oracles.kd(STUDENT[:, :2], TEACHER[:, :2], 2.0), **CLOSE)


def test_kd_is_dkd_with_the_rest_weighted_by_the_teachers_doubt() -> None:
    """The decomposition that DKD starts from: KD = TCKD + (1 − p_t,y) NCKD, image by image."""
    for z_s, z_t, label in zip(STUDENT[:, None], TEACHER[:, None], LABELS[:, None], strict=True):
        doubt = float(1 - oracles.softmax(z_t)[0, label[0]])
        assert oracles.dkd(z_s, z_t, label, beta=doubt) == pytest.approx(oracles.kd(z_s, z_t), **CLOSE)


def test_dist_of_opposite_probabilities_is_2_for_each_term() -> None:
    z_s, z_t = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    assert oracles.dist(z_s, z_t, beta=1.0, gamma=0.0) == pytest.approx(2, **CLOSE)
    assert oracles.dist(z_s, z_t, beta=0.0, gamma=3.0) == pytest.approx(6, **CLOSE)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_ofa_at_gamma_1_is_the_cross_entropy_with_the_teacher(form: str) -> None:
    entropy = -np.mean([(p * np.log(p)).sum() for p in oracles.softmax(TEACHER / 2)])
    expected = oracles.kd(STUDENT, TEACHER, 2.0) / 4 + entropy
    assert oracles.ofa(STUDENT, TEACHER, LABELS, temperature=2.0, form=form) == pytest.approx(expected, **CLOSE)


def test_ofa_of_uniform_logits() -> None:
    """Four classes, p = 1/4, γ = 2: the label weighs 25/16 − 1, another class 1/16 (code) or 1/4 (paper)."""
    z, label = np.zeros((1, 4)), np.array([2])
    assert oracles.ofa(z, z, label, gamma=2.0) == pytest.approx((9 / 16 + 3 / 16) * math.log(4), **CLOSE)
    assert oracles.ofa(z, z, label, gamma=2.0, form="paper") == pytest.approx((9 / 16 + 3 / 4) * math.log(4), **CLOSE)


def test_standardized_logits_have_mean_0_and_deviation_1_and_ignore_scale_and_shift() -> None:
    assert oracles.standardize(np.array([[1.0, 3.0]])) == pytest.approx(np.array([[-1.0, 1.0]]))
    assert oracles.standardize(np.array([[1.0, 3.0]]), 1) == pytest.approx(np.array([[-1, 1]]) / math.sqrt(2))
    assert oracles.kd_standardized(STUDENT, 3 * STUDENT - 1, 2.0) == pytest.approx(0, abs=1e-12)
    assert oracles.dkd_standardized(STUDENT, 3 * STUDENT - 1, LABELS) == pytest.approx(0, abs=1e-12)
    same = oracles.ofa(oracles.standardize(STUDENT), oracles.standardize(TEACHER), LABELS, gamma=1.5)
    assert oracles.ofa_standardized(5 * STUDENT, TEACHER + 2, LABELS, gamma=1.5) == pytest.approx(same, **CLOSE)


def test_losses_ignore_the_order_of_images_and_of_classes() -> None:
    rows, columns = RNG.permutation(6), RNG.permutation(5)
    renamed = np.argsort(columns)[LABELS]
    for loss in (oracles.dkd, oracles.ofa, oracles.dkd_standardized, oracles.ofa_standardized):
        value = loss(STUDENT, TEACHER, LABELS)
        assert loss(STUDENT[rows], TEACHER[rows], LABELS[rows]) == pytest.approx(value, **CLOSE)
        assert loss(STUDENT[:, columns], TEACHER[:, columns], renamed) == pytest.approx(value, **CLOSE)


def test_crd_with_equal_embeddings() -> None:
    """All scores are e^(1/τ) = 4, N = 2, M = 4: h = 4 / 4.5, and with Z = M · 4 it is (1/4) / (3/4)."""
    x, memory, tau = np.array([[1.0, 0.0]] * 3), np.array([[1.0, 0.0]] * 4), 1 / math.log(4)
    own, drawn = np.array([0, 1, 2]), np.array([[1, 2], [2, 3], [0, 3]])
    expected = -math.log(8 / 9) - 2 * math.log(1 / 9)
    assert oracles.crd(x, memory, own, drawn, tau=tau) == pytest.approx(expected, **CLOSE)
    z = oracles.crd_z(x, memory, own, drawn, tau)
    assert z == pytest.approx(16, **CLOSE)
    expected = -math.log(1 / 3) - 2 * math.log(2 / 3)
    assert oracles.crd(x, memory, own, drawn, tau=tau, z=z) == pytest.approx(expected, **CLOSE)


def test_crd_tells_the_own_image_from_the_drawn() -> None:
    """Orthogonal embeddings, N = 1 and M = 2: the own score is e, the drawn score 1."""
    x, memory = np.eye(2), np.eye(2)
    value = oracles.crd(x, memory, np.array([0, 1]), np.array([[1], [0]]), tau=1.0)
    assert value == pytest.approx(-math.log(math.e / (math.e + 0.5)) - math.log(0.5 / 1.5), **CLOSE)


def test_crd_memory_moves_own_rows_alone_and_keeps_norm_1() -> None:
    memory = oracles.crd_memory_update(np.eye(2), np.array([[0.0, 1.0]]), np.array([0]))
    assert memory == pytest.approx(np.array([[1, 1] / np.sqrt(2), [0, 1]]))


def test_rsd_of_uncorrelated_standard_features_is_0() -> None:
    f = 1e6 * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # the scale hides the 1e-5 of std
    assert oracles.rsd(f, 3 * f + 1) == pytest.approx(0, abs=1e-9)
    assert oracles.rsd(f[:, ::-1], f, kappa=0.5) == pytest.approx(2 + 0.5 * 2, rel=1e-9)
    assert oracles.rsd(-f, f) == pytest.approx(8, rel=1e-9)


def test_rsd_projector() -> None:
    """±1000 is standardised to ±1, GELU(1) = Φ(1) and GELU(−1) = −Φ(−1); the norm's weights are 1 and 0."""
    x, norm = np.array([[1e3], [-1e3]]), (np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    out = oracles.rsd_projector(x, np.ones((2, 1)), norm, np.array([[1.0, 0.0], [0.0, 2.0]]))
    phi = 0.8413447460685429  # Φ(1)
    assert out == pytest.approx(np.array([[phi, 2 * phi], [phi - 1, 2 * phi]]), rel=1e-9)


def test_info_nce() -> None:
    same = np.ones((5, 3))
    assert oracles.info_nce(same, 2 * same, 0.07) == pytest.approx(math.log(5), **CLOSE)
    assert oracles.info_nce(np.eye(4), 3 * np.eye(4), 0.5) == pytest.approx(math.log(1 + 3 * math.exp(-2)), **CLOSE)
    rows = RNG.permutation(6)
    value = oracles.info_nce(STUDENT, TEACHER, 0.3)
    assert oracles.info_nce(STUDENT[rows], TEACHER[rows], 0.3) == pytest.approx(value, **CLOSE)
    assert oracles.info_nce(STUDENT, TEACHER[rows], 0.3) != pytest.approx(value, rel=1e-3)


def test_fbt_weights_each_arrow() -> None:
    names = ("teacher", "student", "assistant")
    pooled = dict(zip(names, RNG.normal(size=(3, 6, 4)), strict=True))
    logits = dict(zip(names, RNG.normal(size=(3, 6, 5)), strict=True))
    layer = {"student": (RNG.normal(size=(4, 4)), RNG.normal(size=4)), "assistant": (np.eye(4), None)}
    one = [oracles.fbt(pooled, logits, LABELS, layer, weights=w, gamma=1.2) for w in np.eye(3)]
    both = oracles.fbt(pooled, logits, LABELS, layer, weights=(2.0, 1.0, 0.5), gamma=1.2)
    assert both == pytest.approx(2 * one[0] + one[1] + 0.5 * one[2], **CLOSE)
    student = oracles.linear(pooled["student"], layer["student"])
    contrast = oracles.info_nce(student, pooled["assistant"], 0.07)
    between_logits = oracles.ofa(logits["student"], logits["assistant"], LABELS, gamma=1.2)
    assert one[2] == pytest.approx(contrast + between_logits, **CLOSE)


MAP = np.zeros((1, 1, 5, 5))
MAP[0, 0, 1:-1, 1:-1] = [[0, 0, 0], [0, 1, 0], [0, 0, 2]]
WORDS = np.array([[0.0], [2.0]])


def test_obow_distances_drop_the_ring() -> None:
    ring = MAP.copy()
    ring[:, :, 0] = ring[:, :, :, -1] = 100
    assert oracles.distances(ring, WORDS) == pytest.approx(oracles.distances(MAP, WORDS))
    assert oracles.distances(MAP, WORDS)[0, 3:5] == pytest.approx(np.array([[0, 4], [1, 1]]))
    assert oracles.update_mean_distance(MAP, WORDS, 0.5, 0.9) == pytest.approx(0.45 + 0.1 / 9)


def test_obow_codes_and_bags() -> None:
    """δ⁻¹ / m̄ = log 3 / 4: a location on one word has the code (3/4, 1/4), the one between (1/2, 1/2)."""
    code = oracles.codes(MAP, WORDS, mean_distance=4.0, inverse_delta=math.log(3))
    assert code[0, 0] == pytest.approx([0.75, 0.25])
    assert code[0, 4] == pytest.approx([0.5, 0.5])
    assert code[0, 8] == pytest.approx([0.25, 0.75])
    assert oracles.bags(code) == pytest.approx(np.array([[0.5, 0.5]]))
    assert oracles.bags(code[:, :4]) == pytest.approx(np.array([[0.75, 0.25]]))
    assert oracles.bags(code[:, ::-1]) == pytest.approx(oracles.bags(code))


def test_obow_dictionary_is_a_queue() -> None:
    candidates = oracles.word_candidates(MAP, np.array([[0, 0]]))
    assert candidates == pytest.approx(np.array([[1 / 3]]))
    words, oldest = oracles.dictionary_update(np.arange(4.0)[:, None], np.array([[10.0], [11.0]]), 2)
    assert words.ravel().tolist() == [0, 1, 10, 11]
    assert oldest == 0


def test_obow_word_candidates_at_a_location_of_the_averaged_map() -> None:
    maps = np.arange(36.0).reshape(1, 1, 6, 6)  # linear, so that a mean is its centre
    assert oracles.word_candidates(maps, np.array([[0, 1]])) == pytest.approx(maps[:, :, 2, 3])


def test_obow_head_and_logits() -> None:
    words = np.array([[3.0, 0.0], [0.0, 0.5]])  # normalised: the identity; normalised over the words: ±1
    first = np.array([[1.0, 0.0], [0.0, 1.0]])
    head = oracles.dynamic_head(
        words, first, (np.full(2, 2.0), np.zeros(2)), (np.array([[3.0, 0.0], [0.0, 1.0]]), None)
    )
    assert head == pytest.approx(np.eye(2), abs=1e-12)
    assert oracles.logits(np.array([[1.0, 2.0]]), head, 5.0) == pytest.approx(np.array([[5.0, 10.0]]))


def test_obow_loss_is_a_mean_over_levels_and_a_sum_over_kinds() -> None:
    bag, uniform = np.array([[1.0, 0.0], [0.5, 0.5]]), np.zeros((2, 2))
    half = math.log(2) / 2  # KL is log 2 for the first image and 0 for the second
    assert oracles.loss([[[uniform]]], [bag]) == pytest.approx(half)
    assert oracles.loss(
        [[[uniform, uniform], [uniform, uniform]], [[uniform], [uniform]]], [bag, bag]
    ) == pytest.approx(2 * half)
    flat = np.full((2, 2), 0.5)
    assert oracles.loss([[[uniform], [uniform]]], [bag, flat]) == pytest.approx(half / 2)


def test_obow_alpha_goes_from_start_to_1() -> None:
    assert oracles.alpha(0, 10) == pytest.approx(0.99)
    assert oracles.alpha(5, 10) == pytest.approx(0.995)
    assert oracles.alpha(10, 10) == 1
