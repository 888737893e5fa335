"""The analysis of the study of stages: it finds what is there, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.stage_effects import (
    ARMS,
    double_centred,
    interval,
    main_effects,
    p_value,
    relation,
    reliability,
    simulated,
)


def test_effects_of_an_additive_model_are_its_terms() -> None:
    terms = np.array([0.5, -1.0, 2.0, 0.25])
    top1 = {arm: 60 + sum(terms[stage - 1] for stage in arm) for arm in ARMS}
    np.testing.assert_allclose(main_effects(top1), terms)


def test_an_interaction_of_two_stages_changes_no_effect() -> None:
    top1 = {arm: 60.0 + 3 * ((1 in arm) == (2 in arm)) for arm in ARMS}
    np.testing.assert_allclose(main_effects(top1), 0, atol=1e-12)


def test_trends_of_pairs_and_of_depth_do_not_count() -> None:
    rng = np.random.default_rng(0)
    effects, scores = rng.normal(size=(10, 4)), rng.permuted(np.tile(np.arange(4.0), (10, 1)), axis=1)
    moved = effects + rng.normal(size=(10, 1)) + rng.normal(size=(1, 4))
    assert relation(moved, scores) == pytest.approx(relation(effects, scores))
    np.testing.assert_allclose(double_centred(moved).sum(0), 0, atol=1e-12)
    assert relation(np.tile(np.arange(4.0), (10, 1)), scores) == 0


def test_scores_that_are_the_effects_are_found() -> None:
    rng = np.random.default_rng(1)
    effects = np.repeat(rng.permuted(np.tile(np.arange(4.0), (5, 1)), axis=1), 2, 0)
    students, teachers = [f"s{i // 2}" for i in range(10)], [f"t{i % 2}" for i in range(10)]
    assert relation(effects, effects) == pytest.approx(1)
    assert relation(effects, -effects) == pytest.approx(-1)
    assert p_value(effects, effects, students, teachers) <= 2 / 120
    low, high = interval(effects, effects + 0.01 * rng.normal(size=effects.shape), students)
    assert low > 0.9 or high > 0.9


@pytest.mark.slow
def test_shuffled_scores_are_found_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(2)
    found = [p_value(*simulated(rng, 0.0)) for _ in range(150)]
    assert np.mean(np.array(found) <= 0.05) < 0.1
    assert 0.3 < np.median(found) < 0.7


def test_reliability_is_1_of_equal_seeds_and_near_0_of_noise() -> None:
    rng = np.random.default_rng(3)
    effects = rng.normal(size=(10, 4))
    assert reliability(np.stack([effects, effects])) == pytest.approx(1)
    noise = np.mean([np.tanh(reliability(rng.normal(size=(4, 10, 4)))) for _ in range(50)])
    assert abs(noise) < 0.3
