"""Behind which stages the assistant's networks are cut."""

from __future__ import annotations

import numpy as np
import pytest

from cka_probe.distill.assistant.cuts import candidates, choose_cut, cut_stages, parse_cut, reasons
from cka_probe.errors import FeatureError, SpecError
from cka_probe.results.similarity import Layer, Similarity

OWN, OTHER = ["a.1", "a.2", "a.3", "a.4"], ["b.1", "b.2", "b.3", "b.4"]


def similarity(values: dict[tuple[int, int], float], error: float = 0.0) -> Similarity:
    """Of four stages with four, 0.1 where nothing is said."""
    table = np.full((4, 4), 0.1)
    for (own, other), value in values.items():
        table[own - 1, other - 1] = value
    rows, cols = ([Layer(model, name) for name in names] for model, names in (("a", OWN), ("b", OTHER)))
    return Similarity(table, np.full((4, 4), error), np.zeros((4, 4)), rows, cols, "cka")


@pytest.mark.parametrize(
    ("text", "counts", "expected"),
    [
        ("3", (4, 4), (3, 3)),
        ("1", (4, 4), (1, 1)),
        ("3", (3, 5), (2, 4)),
        ("3", (2, 12), (1, 9)),
        ("1", (2, 2), (1, 1)),
        ("3,2", (4, 3), (3, 2)),
        ("auto", (4, 4), None),
    ],
)
def test_a_cut_is_of_four_stages_or_names_one_of_each(
    text: str, counts: tuple[int, int], expected: tuple[int, int] | None
) -> None:
    assert cut_stages(text, counts) == expected


@pytest.mark.parametrize("text", ["", "0", "4", "1,0", "1,2,3", "-1", "three", "3.0", "²", "99999"])
def test_what_is_no_cut_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--cut must be auto"):
        parse_cut(text)


def test_stages_that_are_not_there_are_refused() -> None:
    with pytest.raises(SpecError, match="stage of the teacher from 1 to 2, as the assistant needs the last one"):
        cut_stages("3,3", (4, 3))
    with pytest.raises(SpecError, match="the student has 1 stage. Name several layers with --student-layers"):
        cut_stages("3", (1, 4))


def test_auto_looks_at_stages_two_and_three_at_most_one_apart() -> None:
    found = candidates(similarity({}), OWN, OTHER)
    assert [candidate.stages for candidate in found] == [(2, 2), (2, 3), (3, 2), (3, 3)]


def test_auto_takes_the_most_similar_pair() -> None:
    found = candidates(similarity({(2, 3): 0.9, (1, 1): 0.99, (4, 4): 0.99, (3, 3): 0.8}), OWN, OTHER)
    chosen = choose_cut(found, (3, 3))
    assert chosen.stages == (2, 3)
    expected = ["less similar", "the most similar", "less similar", "less similar"]
    assert [row["reason"] for row in reasons(found, chosen)] == expected


def test_pairs_that_differ_by_less_than_their_errors_go_to_the_papers_cut() -> None:
    found = candidates(similarity({(2, 3): 0.9, (3, 3): 0.88}, error=0.02), OWN, OTHER)
    chosen = choose_cut(found, (3, 3))
    assert chosen.stages == (3, 3)
    assert [row["reason"].partition(" ")[0] for row in reasons(found, chosen)] == ["less", "as", "less", "the"]
    found = candidates(similarity({(2, 3): 0.9, (3, 3): 0.85}, error=0.02), OWN, OTHER)
    assert choose_cut(found, (3, 3)).stages == (2, 3)


def test_a_pair_without_a_similarity_is_not_chosen() -> None:
    values = {(own, other): np.nan for own in range(1, 5) for other in range(1, 5)}
    found = candidates(similarity(values | {(2, 2): 0.0}), OWN, OTHER)
    assert choose_cut(found, (3, 3)).stages == (2, 2)
    with pytest.raises(FeatureError, match="defined for one pair of stages at least"):
        choose_cut(candidates(similarity(values), OWN, OTHER), (3, 3))


def test_networks_of_two_stages_are_cut_behind_the_first() -> None:
    found = candidates(similarity({}), OWN[:2], OTHER[:2])
    assert [candidate.stages for candidate in found] == [(1, 1)]


def test_a_comparison_without_the_stages_is_refused() -> None:
    with pytest.raises(SpecError, match="must hold the stage 'c.2'"):
        candidates(similarity({}), ["c.1", "c.2", "c.3"], OTHER)
