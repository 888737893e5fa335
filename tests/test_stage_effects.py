"""The analysis of the study of stages: it finds what is there, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.stage_effects import (
    ARMS,
    LEAST,
    MOST,
    RULES,
    RUNS,
    Arm,
    double_centred,
    gains,
    interval,
    main_effects,
    mean_interval,
    p_value,
    pairs_of,
    relation,
    reliability,
    simulated,
)
from benchmarks.stage_page import accuracies, question_1, question_2


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
    assert 0.9 < low <= high


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


def _rows(top1: Callable[[str, str, int, Arm], float], scores: Callable[[str, str], Sequence[float]]) -> list[dict]:
    """A whole study of three students, two teachers and two seeds."""
    rows: list[dict] = []
    for teacher in ("t1", "t2"):
        rows.append(
            {
                "teacher": teacher,
                "student": "none",
                "seed": "0",
                "arm": "teacher",
                "validation_top1": "0.6",
                "top1": "0.5",
            }
        )
        for student, seed in product(("s1", "s2", "s3"), (1, 2)):
            named = {"teacher": teacher, "student": student, "seed": str(seed)}
            rows.append(named | {"teacher": "none", "arm": "scratch", "validation_top1": "0.2", "top1": f"0.1{seed}"})
            rows += [
                named
                | {"arm": str(arm), "weight": str(arm.weight), "top1": str(top1(teacher, student, seed, arm) / 100)}
                | {"branch_parameters": str(1000 * len(arm.stages)), "branch_milliseconds": str(len(arm.stages))}
                | {f"score_{stage}": str(score) for stage, score in enumerate(scores(teacher, student), 1)}
                for arm in RUNS
            ]
    return rows


def test_tables_of_a_study_that_is_known() -> None:
    """A branch is worth 1 point at the first stage and nothing elsewhere; the first stage is the least similar."""
    rows = _rows(lambda _t, _s, seed, arm: 30 + seed + (1 in arm.stages), lambda *_: (0.1, 0.4, 0.3, 0.2))
    pairs = pairs_of(rows)
    assert len(pairs) == 6
    assert pairs[0].lead == pytest.approx(0.4)
    np.testing.assert_allclose(pairs[0].effects(2), [1, 0, 0, 0], atol=1e-9)
    expected = {
        "least similar two (auto: divergent)": 0.5, "most similar two (auto: aligned)": -0.5, "first two": 0.5,
        "last two": -0.5, "all four": 0.5, "none": -0.5,
    }  # fmt: skip
    assert {rule: pytest.approx(np.mean(list(gains(pairs, rule).values()))) for rule in RULES} == expected
    assert list(gains(pairs, LEAST, MOST).values()) == pytest.approx([1, 1, 1])
    assert list(gains(pairs, LEAST, "all four").values()) == pytest.approx([0, 0, 0])
    assert "The two stages with the least CKA are the last two in 0 of 12 pairs and seeds." in question_1(pairs)
    assert "| s2 | t1 | 2 | 50.0 | 11.5 | 31.5 | 32.0 | 32.5 |" in accuracies(pairs)
    assert "| all four | +0.50 (+0.50 to +0.50) | 4 k | 4 |" in question_2(pairs)
    assert any(line.startswith("| s1 | t1 | 2 | +1.00 |") for line in question_1(pairs))


def test_a_pair_counts_when_it_is_complete_and_its_teacher_is_better_by_10_points() -> None:
    rows = _rows(lambda *_: 30.0, lambda *_: (0.1, 0.2, 0.3, 0.4))
    weak = [
        row | {"validation_top1": "0.29"} if row["arm"] == "teacher" and row["teacher"] == "t2" else row for row in rows
    ]
    assert {pair.teacher for pair in pairs_of(weak)} == {"t1"}
    short = [row for row in rows if not (row["student"] == "s1" and row["seed"] == "2" and row["arm"] == "1,3")]
    assert [list(pair.runs) for pair in pairs_of(short)] == [[1], [1], [1, 2], [1, 2], [1, 2], [1, 2]]


def test_interval_of_a_mean_is_scipys() -> None:
    values = [0.3, -1.2, 2.0, 0.9]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((np.mean(values), *expected))
