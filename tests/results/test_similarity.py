"""The result object: what it holds, refuses, saves and reads back."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

import cka_probe as cp
from cka_probe.errors import OutputError, SpecError
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import FORMAT, Curve, Influence, Layer, Similarity

ODD_NAMES = ("ümläut/π", "a,b;c\"d'e", "back\\slash", "new\nline", "$x_1$", "", "nul\0", " blank ", "😀", "‮rtl")


def similarity(models: dict[str, int] | None = None, **provenance: Any) -> Similarity:
    layers = tuple(
        Layer(model, f"blocks.{index}")
        for model, count in (models or {"a": 3, "b": 2}).items()
        for index in range(count)
    )
    rng = np.random.default_rng(0)
    values, std_error, null = rng.normal(size=(3, len(layers), len(layers)))
    return Similarity(values, abs(std_error), null, layers, layers, "cka", Provenance.from_record(provenance))


def same(first: Similarity, second: Similarity) -> bool:
    arrays = ("values", "std_error", "null")
    labels = ("rows", "cols", "measure", "provenance")
    return all(np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True) for name in arrays) and all(
        getattr(first, name) == getattr(second, name) for name in labels
    )


# what it holds


@pytest.mark.parametrize("name", ["values", "std_error", "null"])
def test_arrays_are_read_only_float64_copies(name: str) -> None:
    layers = (Layer("a", "x"), Layer("a", "y"))
    own: Any = np.ones((2, 2), dtype=np.float32)
    result = Similarity(own, own, own, layers, layers)
    array = getattr(result, name)
    assert array.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 5
    own[0, 0] = 7  # the caller's array stays writable and apart
    assert array[0, 0] == 1


@pytest.mark.parametrize("name", ["values", "std_error", "null"])
@pytest.mark.parametrize("shape", [(3, 2), (2, 2), (6,), (2, 3, 1), ()])
def test_arrays_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    rows, cols = (Layer("a", "x"), Layer("a", "y")), (Layer("b", "x"), Layer("b", "y"), Layer("b", "z"))
    arrays: dict[str, Any] = dict.fromkeys(("values", "std_error", "null"), np.zeros((2, 3))) | {name: np.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name} must have the shape \(rows, cols\) = \(2, 3\), but has"):
        Similarity(rows=rows, cols=cols, **arrays)


def test_models_are_listed_once_in_order() -> None:
    assert similarity({"b": 2, "a": 1, "c": 1}).models == ("b", "a", "c")
    assert similarity().between("b", "a").models == ("b", "a")


def test_a_layer_reads_as_its_model_and_name() -> None:
    assert str(Layer("vit", "blocks.3")) == "vit blocks.3"


def test_repr_says_what_is_compared() -> None:
    assert repr(similarity()) == "Similarity('cka', 5 x 5 layers: a + b x a + b)"
    assert repr(similarity().between("a", "b")) == "Similarity('cka', 3 x 2 layers: a x b)"


# between


@pytest.mark.parametrize(
    ("row_model", "col_model", "rows", "cols"),
    [("a", "b", [0, 1, 2], [3, 4]), ("b", "a", [3, 4], [0, 1, 2]), ("a", "a", [0, 1, 2], [0, 1, 2])],
)
def test_between_is_the_block_of_a_pair(row_model: str, col_model: str, rows: list[int], cols: list[int]) -> None:
    joint = similarity(batches=4)
    block = joint.between(row_model, col_model)
    for name in ("values", "std_error", "null"):
        np.testing.assert_array_equal(getattr(block, name), getattr(joint, name)[np.ix_(rows, cols)])
    assert block.rows == tuple(joint.rows[index] for index in rows)
    assert block.cols == tuple(joint.cols[index] for index in cols)
    assert (block.measure, block.provenance) == (joint.measure, joint.provenance)


def test_between_picks_layers_that_are_not_side_by_side() -> None:
    layers = tuple(Layer(model, name) for model, name in (("a", "x"), ("b", "x"), ("a", "y"), ("b", "y")))
    values = np.arange(16.0).reshape(4, 4)
    block = Similarity(values, values, values, layers, layers).between("a", "b")
    np.testing.assert_array_equal(block.values, [[1, 3], [9, 11]])


@pytest.mark.parametrize(("row_model", "col_model", "axis"), [("vit", "b", "row"), ("a", "vit", "column")])
def test_between_names_the_models_that_there_are(row_model: str, col_model: str, axis: str) -> None:
    with pytest.raises(SpecError, match=rf"No {axis} belongs to a model named 'vit'\. There are: 'a', 'b'\."):
        similarity().between(row_model, col_model)


# interval


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_interval_is_students_over_the_batches(level: float) -> None:
    result = similarity(batches=8)
    low, high = result.interval(level)
    expected = t.interval(level, df=7, loc=result.values, scale=result.std_error)
    np.testing.assert_allclose(low, expected[0], rtol=1e-12)  # the same formula in another order
    np.testing.assert_allclose(high, expected[1], rtol=1e-12)  # the same formula in another order


@pytest.mark.parametrize("provenance", [{"batches": 1}, {}])
def test_interval_of_one_batch_is_nan(provenance: dict[str, Any]) -> None:
    layers = (Layer("a", "x"),)
    value, nothing = np.array([[0.5]]), np.array([[np.nan]])
    low, high = Similarity(value, nothing, value, layers, layers, "cka", Provenance.from_record(provenance)).interval()
    assert np.isnan(low).all()
    assert np.isnan(high).all()


# to_frame


def test_frame_has_one_row_a_cell() -> None:
    block = similarity().between("a", "b")
    frame = block.to_frame()
    assert list(frame.columns) == [
        "row_model", "row_layer", "col_model", "col_layer", "measure", "value", "std_error", "null",
    ]  # fmt: skip
    assert len(frame) == 6
    cells = [(row, col) for row in range(3) for col in range(2)]
    for (row, col), line in zip(cells, frame.itertuples(index=False), strict=True):
        assert (line.row_model, line.row_layer) == block.rows[row]
        assert (line.col_model, line.col_layer) == block.cols[col]
        assert line.measure == "cka"
        numbers = (block.values[row, col], block.std_error[row, col], block.null[row, col])
        assert (line.value, line.std_error, line.null) == numbers


def test_frame_can_be_changed_without_changing_the_result() -> None:
    result = similarity()
    before = result.values.copy()
    frame = result.to_frame()
    frame["value"] += 1
    np.testing.assert_array_equal(result.values, before)


def test_a_pivot_keeps_the_order_of_the_layers() -> None:
    rows, cols = (tuple(Layer(model, f"blocks.{i}") for i in range(12)) for model in "ab")
    values = np.arange(144.0).reshape(12, 12)
    frame = cp.Similarity(values, values, values, rows, cols).to_frame()
    table = frame.pivot(index="row_layer", columns="col_layer", values="value")
    assert list(table.index) == [layer.name for layer in rows]
    assert list(table.columns) == [layer.name for layer in cols]
    np.testing.assert_array_equal(table.to_numpy(), values)


# save and load


def test_load_reads_back_what_save_wrote(tmp_path: Path) -> None:
    result = similarity(
        batches=4, data={"source": "digits", "examples": 100}, debiased=True, kernel=None, list=[1, 2.5, "x"]
    )
    result.save(tmp_path / "similarity.npz")
    loaded = Similarity.load(tmp_path / "similarity.npz")
    assert same(loaded, result)
    assert all(isinstance(layer, Layer) for layer in (*loaded.rows, *loaded.cols))
    assert not loaded.values.flags.writeable


def test_a_block_with_nan_survives_the_round_trip(tmp_path: Path) -> None:
    rows, cols = (Layer("a", "x"), Layer("a", "y")), (Layer("b", "x"),)
    values, nothing = np.array([[0.5], [np.nan]]), np.full((2, 1), np.nan)
    result = Similarity(values, nothing, -values, rows, cols, "cka-rbf")
    result.save(tmp_path / "block.npz")
    assert same(Similarity.load(tmp_path / "block.npz"), result)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_survive_the_round_trip(name: str, tmp_path: Path) -> None:
    layers = (Layer(name, name), Layer("plain", name))
    result = Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers, "cka", Provenance(others={"source": name}))
    result.save(tmp_path / "odd.npz")
    assert same(Similarity.load(tmp_path / "odd.npz"), result)


def test_save_writes_the_very_path_given(tmp_path: Path) -> None:
    similarity().save(tmp_path / "similarity.result")
    assert [path.name for path in tmp_path.iterdir()] == ["similarity.result"]
    similarity().save(str(tmp_path / "as a string"))
    assert same(Similarity.load(str(tmp_path / "as a string")), similarity())


def saved(**changes: Any) -> bytes:
    """A good file, some of its fields changed."""
    layers = [["a", "x"], ["a", "y"]]
    labels = {"rows": layers, "cols": layers, "measure": "cka", "provenance": {}}
    labels |= changes.pop("labels", {})
    arrays = {name: np.eye(2) for name in ("values", "std_error", "null")}
    buffer = io.BytesIO()
    np.savez(buffer, **{"format": np.array(FORMAT), "labels": np.array(json.dumps(labels)), **arrays, **changes})
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.eye(2))
    return buffer.getvalue()


def other_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weights=np.eye(2))
    return buffer.getvalue()


def pickled_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, format=np.array([{}], dtype=object))
    return buffer.getvalue()


def damaged() -> bytes:
    content = bytearray(saved(values=np.random.default_rng(0).normal(size=(2, 2))))
    start = content.index(b"NUMPY")
    content[start : start + 100] = bytes(100)
    return bytes(content)


def test_a_good_file_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(saved())
    np.testing.assert_array_equal(Similarity.load(tmp_path / "good").values, np.eye(2))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"row,col\n1,2\n", id="text"),
        pytest.param(b"PK\x03\x04 and then nothing", id="a zip in name only"),
        pytest.param(saved()[:-200], id="cut off"),
        pytest.param(damaged(), id="damaged"),
        pytest.param(npy(), id="an npy file"),
        pytest.param(other_npz(), id="another npz file"),
        pytest.param(pickled_npz(), id="pickled objects"),
        pytest.param(saved(format=np.array("one")), id="a format that is no number"),
        pytest.param(saved(values=np.eye(3)), id="values of another shape"),
        pytest.param(saved(labels={"rows": [["a"], ["b"]]}), id="layers without a name"),
        pytest.param(saved(labels={"rows": None}), id="no rows"),
        pytest.param(saved(labels={"rows": [["a", 1], ["b", 2]]}), id="layers that are no texts"),
        pytest.param(saved(labels={"measure": 3}), id="a measure that is no text"),
        pytest.param(saved(labels={"provenance": [1]}), id="a provenance that is no mapping"),
        pytest.param(saved(labels={"influence": [["a"]]}), id="an influence without layers"),
        pytest.param(saved(values=np.eye(2) * 1j), id="complex"),
        pytest.param(saved(values=np.array([["a", "b"]] * 2)), id="values that are texts"),
        pytest.param(saved(curve_values=np.eye(2)), id="half a curve"),
        pytest.param(
            saved(curve_examples=np.arange(3), curve_values=np.ones((3, 2, 2)), curve_std_error=np.ones((3, 2))),
            id="a curve of another shape",
        ),
    ],
)
def test_load_refuses_what_save_did_not_write(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage.npz"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"garbage\.npz is not a similarity saved by cka-probe"):
        Similarity.load(path)


def test_load_says_that_a_file_is_newer_than_the_package(tmp_path: Path) -> None:
    (tmp_path / "newer").write_bytes(saved(format=np.array(FORMAT + 1)))
    with pytest.raises(OutputError, match=rf"newer cka-probe \(format {FORMAT + 1}\)"):
        Similarity.load(tmp_path / "newer")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_load_refuses_a_path_that_is_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a similarity saved by cka-probe"):
        Similarity.load(tmp_path / name)


def test_load_does_not_wait_for_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(OutputError, match=r"pipe\.npz is not a similarity .*: it is a named pipe"):
        Similarity.load(tmp_path / "pipe.npz")


# tests, curve and influence


def with_everything() -> Similarity:
    base = similarity()
    shape = base.values.shape
    curve = Curve(np.array([16, 32]), np.stack([base.values, base.values + 1]), np.ones((2, *shape)))
    moved = (Influence("cats/0.png", base.rows[0], base.cols[-1], -0.25),)
    ones = np.full(shape, 0.5)
    return replace(base, p_value=ones / 2, p_value_max=ones, curve=curve, influence=moved)


def test_what_was_asked_for_beside_the_values_is_saved_and_loaded(tmp_path: Path) -> None:
    whole = with_everything()
    whole.save(tmp_path / "a.npz")
    again = Similarity.load(tmp_path / "a.npz")
    assert again.p_value is not None
    assert again.p_value_max is not None
    assert again.curve is not None
    assert whole.curve is not None
    np.testing.assert_array_equal(again.p_value, whole.p_value)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.curve.values, whole.curve.values)
    assert again.influence == whole.influence


def test_one_pair_keeps_its_part_of_them() -> None:
    pair = with_everything().between("a", "b")
    assert pair.p_value is not None
    assert pair.curve is not None
    assert pair.p_value.shape == pair.values.shape
    np.testing.assert_array_equal(pair.curve.values[1], pair.values + 1)
    assert len(pair.influence) == 1
    assert with_everything().between("a", "a").influence == ()


def test_the_tables_have_the_tests_and_the_curve() -> None:
    frame = with_everything().to_frame()
    assert list(frame.columns[-2:]) == ["p_value", "p_value_max"]
    curve = with_everything().curve_frame()
    assert sorted(curve["examples"].unique()) == [16, 32]
    assert len(curve) == 2 * len(frame)
    with pytest.raises(SpecError, match="no curve"):
        similarity().curve_frame()


def test_an_interval_on_fishers_scale_stays_below_1_and_is_that_of_t() -> None:
    layers = (Layer("a", "x"), Layer("b", "x"))
    values, errors = np.array([[1.0, 0.9], [0.9, 1.0]]), np.array([[0.0, 0.05], [0.05, 0.0]])
    found = Similarity(values, errors, values * 0, layers, layers, "rsa", {"blocks": 10})
    low, high = found.interval()
    reach = 2.2621571628 * 0.05 / (1 - 0.81)  # Student's t at 0.975, 9 degrees of freedom; the delta method
    assert low[0, 1] == pytest.approx(np.tanh(np.arctanh(0.9) - reach), abs=1e-9)
    assert high[0, 1] == pytest.approx(np.tanh(np.arctanh(0.9) + reach), abs=1e-9)
    assert high[0, 1] < 1
    assert low[0, 0] == high[0, 0] == 1


def test_a_few_batches_that_dominate_widen_the_interval_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 512, 12))
    tame = cp.compare({"a": x, "b": y}, batch_size=64)
    assert "dominate" not in caplog.text
    x = x.copy()
    x[[5, 77]] *= 30
    wild = cp.compare({"a": x, "b": y}, batch_size=64)
    assert "A few batches dominate the sums" in caplog.text
    assert wild.batches is not None
    assert tame.batches is not None
    assert wild.batches[0, 0] < 2.5 < 7 < tame.batches[0, 0]
    block = wild.between("a", "b")
    low, high = block.interval()
    reach = t.ppf(0.975, block.batches[0, 0] - 1) * block.std_error[0, 0]  # type: ignore[index]
    assert (high - low)[0, 0] == pytest.approx(2 * reach)


@pytest.mark.parametrize("last", [4, 20, 44, 64])
def test_a_short_last_batch_is_no_batch_that_others_dominate(last: int, caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 128 + last, 12))
    found = cp.compare({"a": x, "b": y}, batch_size=64)
    assert "dominate" not in caplog.text
    assert found.batches is not None
    assert 1.9 < found.batches[0, 0] < 3
    x = x.copy()
    x[5] *= 30
    cp.compare({"a": x, "b": y}, batch_size=64)
    assert "A few batches dominate the sums" in caplog.text


def test_effective_batches_are_kept_in_the_file(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 64, 5))
    found = cp.compare({"a": x, "b": y}, batch_size=16)
    found.save(tmp_path / "s.npz")
    again = Similarity.load(tmp_path / "s.npz")
    assert found.batches is not None
    assert again.batches is not None
    np.testing.assert_array_equal(again.batches, found.batches)
