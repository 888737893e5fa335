"""Stage choice: what each rule picks on a matrix whose answer is plain to see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

import cka_probe as cp
from cka_probe.distill.stages import (
    StageScore,
    branch_weights,
    choose_stages,
    exit_points,
    match_layers,
    parse_stages,
    score_stages,
    scores_differ,
)
from cka_probe.errors import FeatureError, SpecError

VALUES = np.array([[0.9, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.3, 0.4], [0.0, 0.2, 0.8]])
LAYERS = [f"layer{stage}" for stage in (1, 2, 3, 4)]


def similarity(values: np.ndarray = VALUES, rows: list[str] = LAYERS) -> cp.Similarity:
    cols = tuple(cp.Layer("teacher", f"blocks.{index}") for index in range(values.shape[1]))
    return cp.Similarity(values, values * 0.01, values * 0, tuple(cp.Layer("student", row) for row in rows), cols)


def scores(parameters: tuple[int, ...] = (40, 30, 20, 10)) -> tuple:
    return score_stages(similarity(), LAYERS, parameters)


def test_a_stage_is_scored_by_its_best_match() -> None:
    first = scores()[0]
    assert (first.stage, first.match, first.similarity) == (1, "blocks.0", 0.9)
    assert first.std_error == pytest.approx(0.009)
    assert [score.match for score in scores()] == ["blocks.0", "blocks.1", "blocks.2", "blocks.2"]


def test_rules_choose_the_least_and_the_most_similar() -> None:
    assert choose_stages(scores(), "divergent", count=2).stages == (2, 3)
    assert choose_stages(scores(), "aligned", count=2).stages == (1, 4)
    assert choose_stages(scores(), "divergent", count=9).stages == (1, 2, 3, 4)


def test_the_budget_rule_takes_the_most_divergence_that_fits() -> None:
    """Divergences .1 .5 .6 .2 at 40, 30, 20, 10: 60 holds stages 2, 3 and 4, 40 only 3 and 4, 5 none."""
    assert choose_stages(scores(), "budget", budget=0.6).stages == (2, 3, 4)
    assert choose_stages(scores(), "budget", budget=0.4).stages == (3, 4)
    assert choose_stages(scores(), "budget", budget=1).stages == (1, 2, 3, 4)
    assert choose_stages(scores(), "budget", budget=0.05).stages == (4,), "the cheapest, where nothing fits"


def test_stages_within_their_errors_are_equal_and_the_parameters_decide() -> None:
    """0.98, 0.975, 0.985, 0.98 with errors of about 0.01: the budget rule takes as many of the cheap ones as fit."""
    close = similarity(np.array([[0.98, 0.1], [0.975, 0.1], [0.985, 0.1], [0.98, 0.1]]))
    scored = score_stages(close, LAYERS, (40, 30, 20, 10))
    assert not scores_differ(scored)
    for rule, chosen in (("budget", (2, 3, 4)), ("divergent", (3, 4)), ("aligned", (3, 4))):
        choice = choose_stages(scored, rule, count=2, budget=0.6)
        assert (choice.stages, choice.differ) == (chosen, False)
        assert all("the parameters alone decided" in reason for reason in choice.reasons)
        assert not choice.record()["scores_differ"]
    assert [score.similarity for score in choice.scores] == [0.98, 0.975, 0.985, 0.98], "as they were measured"
    told = exit_points("Exit branches", choose_stages(scored, "aligned", count=2).record(), "CKA", 0.3)
    assert told.startswith(
        "Exit branches at stages 3 (layer3, CKA 0.985 ± 0.010) and 4 (layer4, 0.980 ± 0.010), 30% of all branches' "
        "parameters. The scores of the stages do not differ by more than their standard errors"
    )


def test_scores_differ_by_more_than_the_error_of_a_difference() -> None:
    for gap, differ in ((0.009, False), (0.011, True)):  # √(0.006² + 0.008²) = 0.01
        scored = [StageScore(1, "a", "b", 0.5, 0.006, 1), StageScore(2, "c", "b", 0.5 + gap, 0.008, 1)]
        assert scores_differ(scored) == differ
    unknown = [StageScore(stage, "a", "b", stage / 100, math.nan, 1) for stage in (1, 2)]
    assert scores_differ(unknown), "without standard errors, as it was"


def test_every_stage_has_a_reason_and_the_record_is_plain_yaml() -> None:
    choice = choose_stages(scores(), "divergent", count=2)
    assert "chosen: its best match, blocks.1, has similarity 0.500 ± 0.005" in choice.reasons[1]
    assert choice.reasons[0].startswith("left out:")
    record = yaml.safe_load(yaml.safe_dump(choice.record()))
    assert record["chosen"] == [2, 3]
    assert [row["chosen"] for row in record["stages"]] == [False, True, True, False]


def test_a_stage_without_similarity_is_never_chosen_and_said() -> None:
    values = VALUES.copy()
    values[2] = math.nan
    scored = score_stages(similarity(values), LAYERS, (1, 1, 1, 1))
    for rule in ("divergent", "aligned", "budget"):
        choice = choose_stages(scored, rule, count=4, budget=1)
        assert 3 not in choice.stages
        assert "constant over the images" in choice.reasons[2]
    assert choice.record()["stages"][2]["similarity"] is None
    with pytest.raises(FeatureError, match="defined for one stage at least"):
        choose_stages(score_stages(similarity(VALUES * math.nan), LAYERS, (1, 1, 1, 1)), "divergent")


def test_the_last_block_of_a_stage_stands_for_it() -> None:
    rows = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    scored = score_stages(similarity(rows=rows), ["layer1", "layer2"], (1, 1))
    assert [score.similarity for score in scored] == [0.5, 0.8]
    with pytest.raises(SpecError, match="must hold the student's stage 'layer3'"):
        score_stages(similarity(rows=rows), ["layer3"], (1,))


def test_matched_layers_never_go_back_in_depth() -> None:
    assert match_layers(similarity(), LAYERS) == ["blocks.0", "blocks.1", "blocks.2", "blocks.2"]
    crossed = np.array([[0.1, 0.9], [0.8, 0.2]])  # the best single matches cross; in order, (0, 0) (1, 1) sums to 0.3
    assert match_layers(similarity(crossed, LAYERS[:2]), LAYERS[:2]) == ["blocks.1", "blocks.1"]
    crossed[1, 1] = -0.2  # now both at the first layer, 0.1 + 0.8
    assert match_layers(similarity(crossed, LAYERS[:2]), LAYERS[:2]) == ["blocks.0", "blocks.0"]


def test_layers_are_matched_among_some_columns() -> None:
    assert match_layers(similarity(), LAYERS, among=(0, 2)) == ["blocks.0", "blocks.0", "blocks.2", "blocks.2"]


def test_the_budget_rule_answers_at_once_for_a_deep_network() -> None:
    rng = np.random.default_rng(0)
    values, parameters = rng.uniform(size=(48, 12)), rng.integers(10**5, 10**6, 48).tolist()
    layers = [f"blocks.{index}" for index in range(48)]
    chosen = choose_stages(score_stages(similarity(values, layers), layers, parameters), "budget", budget=0.5).stages
    assert sum(parameters[stage - 1] for stage in chosen) <= 0.5 * sum(parameters)


@pytest.mark.parametrize("text", ["5", "0", "1,,2", "some", "1;2", ""])
def test_unknown_stages_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="numbers from 1 to 4"):
        parse_stages(text, 4)


def test_stages_are_parsed() -> None:
    assert parse_stages("all", 3) == (1, 2, 3)
    assert parse_stages("4, 1,4", 4) == (1, 4)


def test_branch_weights_keep_their_sum() -> None:
    for chosen in ((1,), (2, 4), (1, 2, 3, 4)):
        assert sum(branch_weights(chosen, 4, weight=0.5)) == pytest.approx(2)
        assert sum(branch_weights(chosen, 4, (1, 2, 3, 4))) == pytest.approx(4)
    assert branch_weights((2, 4), 4, (1, 1, 1, 3)) == [1, 3]
    assert branch_weights((2, 4), 4, (1, 1, 1, 3), 0.5, absolute=True) == [0.5, 1.5]
    with pytest.raises(SpecError, match="a number for each of the 4 stages"):
        branch_weights((1,), 4, (1, 2))
    with pytest.raises(SpecError, match="one above 0"):
        branch_weights((1,), 4, (0, 1, 1, 1))
