"""What is said of a result is what its cells hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cka_probe import compare
from cka_probe.results.cautions import alarm, cautions, equal_layers
from cka_probe.results.findings import compare_pair, control_band, model_matrix, model_pairs, relative_depths
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer, Similarity


def joint(counts: dict[str, int], *, provenance: dict[str, Any] | None = None, seed: int = 0) -> Similarity:
    layers = tuple(Layer(model, f"l{index}") for model, count in counts.items() for index in range(count))
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.1, 0.9, (len(layers), len(layers)))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1.0)
    errors, null = np.full_like(values, 0.02), rng.normal(0, 0.01, values.shape)
    return Similarity(values, errors, null, layers, layers, "cka", Provenance.from_record(provenance or {}))


def test_relative_depth_ends_at_one() -> None:
    assert relative_depths(4).tolist() == [0.25, 0.5, 0.75, 1.0]


def test_pairs_are_of_different_models_or_of_the_only_one_with_itself() -> None:
    assert model_pairs(joint({"a": 2, "b": 2, "c": 1})) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert model_pairs(joint({"a": 2})) == [("a", "a")]
    assert model_pairs(joint({"a": 2, "b": 2}).between("b", "a")) == [("b", "a")]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_pair_is_read_at_matched_depth_at_its_best_and_at_its_largest(swapped: bool) -> None:
    similarity = joint({"a": 4, "b": 2})
    names = ("b", "a") if swapped else ("a", "b")
    block = similarity.between("a", "b").values
    found = compare_pair(similarity, *names)
    assert found is not None
    # a's layers stand at 1/4, 2/4, 3/4 and 1, b's at 1/2 and 1; 3/4 is as near to both, and takes the first.
    matched = [block[0, 0], block[1, 0], block[2, 0], block[3, 1]]
    assert [cell.value for cell in found.matched] == matched
    assert [cell.value for cell in found.best] == block.max(1).tolist()
    for cells in (found.matched, found.best):
        assert [found.depth(cell) for cell in cells] == [0.25, 0.5, 0.75, 1.0]
    assert found.mean == pytest.approx(np.mean(matched))
    assert found.smallest.value == min(matched)
    assert found.largest.value == block.max()
    row, col = np.unravel_index(block.argmax(), block.shape)
    layers = {found.largest.first, found.largest.second}
    assert layers == {Layer("a", f"l{row}"), Layer("b", f"l{col}")}
    assert found.largest.first.model == names[0]
    assert found.mean_error == pytest.approx(0.02)


def test_layers_without_a_value_are_passed_over() -> None:
    similarity = joint({"a": 2, "b": 2})
    values = similarity.values.copy()
    values[1, :] = values[:, 1] = np.nan
    broken = Similarity(values, similarity.std_error, similarity.null, similarity.rows, similarity.cols)
    found = compare_pair(broken, "a", "b")
    assert found is not None
    assert [cell.first.name for cell in found.matched] == ["l0"]
    nothing = Similarity(
        np.full((4, 4), np.nan), similarity.std_error, similarity.null, similarity.rows, similarity.cols
    )
    assert compare_pair(nothing, "a", "b") is None
    assert np.isnan(model_matrix(nothing)[0, 1])


def test_the_matrix_of_models_holds_the_means_and_is_symmetric() -> None:
    similarity = joint({"a": 3, "b": 3, "c": 3})
    matrix = model_matrix(similarity)
    assert np.array_equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1, 1, 1]
    assert matrix[0, 2] == pytest.approx(similarity.between("a", "c").values.diagonal().mean())


def test_the_band_of_the_control_holds_95_percent_of_it_between_layers() -> None:
    similarity = joint({"a": 40})
    off = similarity.null[~np.eye(40, dtype=bool)]
    low, high = control_band(similarity)
    assert ((low <= off) & (off <= high)).mean() == pytest.approx(0.95, abs=0.002)
    assert np.isnan(control_band(joint({"a": 1}))).all()


def test_the_band_of_a_biased_control_lies_around_the_bias() -> None:
    similarity = joint({"a": 9})
    biased = Similarity(
        similarity.values, similarity.std_error, similarity.null + 0.3, similarity.rows, similarity.cols
    )
    low, high = control_band(biased)
    assert 0.2 < low < 0.3 < high < 0.4


SOUND = {
    "data": {"source": "digits", "examples": 2048},
    "batch_size": 128,
    "batches": 16,
    "debiased": True,
    "subjects": [],
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"data": {"source": "digits", "examples": 100}}, "100 images are few"),
        ({"batch_size": 16}, "Batches of 16 are small"),
        ({"batches": 1}, "no standard errors"),
        ({"debiased": False, "subjects": [{"name": "a", "features": {"l0": 500, "l1": 3}}]}, "in 1 of 2 layers"),
        ({"subjects": [{"name": "a", "weights": "random, seed 0"}]}, "Random weights, not trained: a"),
        ({"subjects": [{"name": "a", "weights": "as the factory returns it"}]}, "those that the factory sets: a"),
    ],
)
def test_what_a_referee_would_object_to_is_said(changed: dict[str, Any], said: str | None) -> None:
    found = cautions(joint({"a": 2, "b": 2}, provenance={**SOUND, **changed}))
    assert (found == []) if said is None else any(said in caution for caution in found)


def test_constant_layers_and_values_in_the_noise_are_said() -> None:
    similarity = joint({"a": 2, "b": 2}, provenance=SOUND)
    values = similarity.values.copy()
    values[1, :] = values[:, 1] = np.nan
    values[0, 2] = values[2, 0] = 0.0
    found = cautions(
        Similarity(values, similarity.std_error, similarity.null, similarity.rows, similarity.cols, "cka", SOUND)
    )
    assert any("Constant over the images, and therefore without a value: a l1." in caution for caution in found)
    assert any("within the noise floor" in caution for caution in found)


def test_of_a_distance_the_smallest_is_the_closest() -> None:
    layers = tuple(Layer(model, name) for model in ("a", "b") for name in ("one", "two"))
    values = np.array([[0, 9, 0.5, 3], [9, 0, 4, 2.5], [0.5, 4, 0, 9], [3, 2.5, 9, 0]])
    similarity = Similarity(values, values / 10, values * 0 + 1, layers, layers, "energy", {"blocks": 10})
    found = compare_pair(similarity, "a", "b")
    assert found is not None
    assert found.largest.value == 0.5  # where they agree most
    assert found.smallest.value == 2.5  # where they part, at matched depth
    assert model_matrix(similarity)[0, 0] == 0
    assert any("two views" in caution for caution in cautions(similarity))
    assert any("swapped" in caution for caution in cautions(similarity))


def test_layers_that_are_equal_by_every_value_are_told_and_others_are_not() -> None:
    similarity = joint({"a": 3, "b": 2})
    assert equal_layers(similarity) == []
    values = similarity.values.copy()
    values[2], values[:, 2] = values[1], values[:, 1]  # a dropout behind l1
    values[1, 2] = values[2, 1] = values[2, 2] = 1 - 1e-9
    twice = Similarity(values, similarity.std_error, similarity.null, similarity.rows, similarity.cols)
    assert equal_layers(twice) == [[Layer("a", "l1"), Layer("a", "l2")]]
    assert any("cannot distinguish them: a l1 = a l2." in caution for caution in cautions(twice))
    values[3, 2] = values[2, 3] = values[3, 2] + 1e-3  # nearly the same, and yet not
    near = Similarity(values, similarity.std_error, similarity.null, similarity.rows, similarity.cols)
    assert equal_layers(near) == []
    assert equal_layers(twice.between("a", "b")) == []


def with_control(control: Any, measure: str = "cka", **provenance: Any) -> Similarity:
    similarity = joint({"a": 3, "b": 3})
    null = np.broadcast_to(control, similarity.values.shape)
    return replace(similarity, null=null, measure=measure, provenance=Provenance.from_record({**SOUND, **provenance}))


@pytest.mark.parametrize("measure", ["cka", "cka-rbf", "rsa", "mantel"])
def test_a_control_far_from_0_is_an_alarm_that_says_what_to_do(measure: str) -> None:
    said = alarm(with_control(-0.43, measure))
    assert said is not None
    assert "near 0, but lies up to 0.43 from it" in said
    assert "--batch-size 64" in said
    assert alarm(with_control(0.05, measure)) is None


def test_a_control_that_is_no_0_by_nature_is_no_alarm() -> None:
    assert alarm(with_control(0.9, "cka:biased", debiased=False)) is None
    assert alarm(with_control(0.9, "cka-rbf:biased", debiased=False)) is None
    for measure in ("mutual-knn", "svcca", "mmd"):
        assert alarm(with_control(0.9, measure)) is None
    assert alarm(with_control(np.nan)) is None


def test_useless_estimates_are_alarming_and_ordinary_ones_are_not() -> None:
    """Independent features, of few and of many dimensions: in batches of 4 the debiased CKA of 16 is noise."""
    rng = np.random.default_rng(0)
    useless = ordinary = 0
    for width in (2, 8, 8, 100):
        for examples, batch, counted in ((16, 4, "useless"), (512, 64, "ordinary"), (512, 128, "ordinary")):
            models = {name: rng.normal(size=(examples, width)) for name in "xyzuv"}
            found = alarm(compare(models, batch_size=batch)) is not None
            useless += found and counted == "useless"
            ordinary += found and counted == "ordinary"
    assert (useless, ordinary) == (4, 0)


def test_copies_are_a_caution_of_paired_measures() -> None:
    copies = {"images": 12, "pairs": [["a.png", "b.png"], ["a.png", "c.png"]]}
    data = {**SOUND["data"], "duplicates": copies}
    found = cautions(joint({"a": 2, "b": 2}, provenance={**SOUND, "data": data}))
    (said,) = (caution for caution in found if "cop" in caution)
    assert said.startswith(f"12 of the {SOUND['data']['examples']:,} images are exact copies of another ")
    assert "(b.png of a.png; c.png of a.png)" in said
