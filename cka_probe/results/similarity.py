"""Similarity: the result object, with its labels, its uncertainty and where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import OutputError, SpecError
from cka_probe.measures.catalogue import about, parse_measure
from cka_probe.results.provenance import Provenance
from cka_probe.runtime.files import reason, require_regular
from cka_probe.runtime.names import utf8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

FORMAT = 2
"""Of the npz file; raised when its fields change. In format 1 the name of a measure was without its options."""

_DRAWN_BY = "cka_probe.reports.notebook"
"""Loaded by its name when a result is drawn, as pandas loads its plots: results depend on no report."""

_CURVE = ("examples", "values", "std_error")
_MATRICES = ("values", "std_error", "null", "p_value", "p_value_max", "batches")


class Layer(NamedTuple):
    """One row or column: a layer of a model, by their names."""

    model: str
    name: str

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


class Influence(NamedTuple):
    """What one example does to one value: ``change`` is the value less that without the example."""

    example: str
    row: Layer
    col: Layer
    change: float


@dataclass(frozen=True, eq=False)
class Curve:
    """The measure at growing numbers of examples, the first ones each time, so that one sees whether there are enough.

    Attributes:
        examples: (points,) int64, ascending.
        values: (points, rows, cols) float64.
        std_error: (points, rows, cols) float64.
    """

    examples: NDArray[np.int64]
    values: NDArray[np.float64]
    std_error: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar each row's layer is to each column's, with its uncertainty.

    Attributes:
        values: (rows, cols) float64, read-only; NaN in the rows and columns of layers that are constant.
        std_error: (rows, cols) float64, read-only: the standard error of each value; NaN where the data were one batch.
        null: (rows, cols) float64, read-only: the same measure on shuffled examples. Its spread is the noise floor.
            Of a distance between distributions, which shuffling does not change: with the two views of half of the
            examples swapped.
        rows: the layers of the rows, in forward order, model by model.
        cols: the layers of the columns.
        measure: its spec in the canonical form, such as ``"cka"`` or ``"cka-rbf:0.8"``.
        provenance: how the values were made: subjects, data, options, versions. A mapping is read as its record.
        p_value: (rows, cols) float64, read-only: of a permutation test of each value; None where there was none.
        p_value_max: (rows, cols) float64, read-only: the same against the largest value between the two models in each
            permutation, so that the p-value of the best pair is corrected for its selection.
        curve: the measure at growing numbers of examples; None where it was not asked for.
        influence: the examples that move the values most.
        batches: (rows, cols) float64, read-only, for CKA: how many equal batches hold as much information, less than
            there were where a few of them dominate the sums; None for measures whose errors are by jackknife.
    """

    values: NDArray[np.float64]
    std_error: NDArray[np.float64]
    null: NDArray[np.float64]
    rows: tuple[Layer, ...]
    cols: tuple[Layer, ...]
    measure: str = "cka"
    provenance: Provenance = field(default_factory=Provenance)
    p_value: NDArray[np.float64] | None = None
    p_value_max: NDArray[np.float64] | None = None
    curve: Curve | None = None
    influence: tuple[Influence, ...] = ()
    batches: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.provenance, Mapping):
            object.__setattr__(self, "provenance", Provenance.from_record(self.provenance))
        shape = (len(self.rows), len(self.cols))
        for name in _MATRICES:
            if getattr(self, name) is None:
                continue
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != shape:
                raise ValueError(f"{name} must have the shape (rows, cols) = {shape}, but has {array.shape}.")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.curve is not None:
            points = (len(self.curve.examples), *shape)
            for name, array in (("values", self.curve.values), ("std_error", self.curve.std_error)):
                if array.shape != points:
                    raise ValueError(f"The curve's {name} must have the shape {points}, but has {array.shape}.")

    def __repr__(self) -> str:
        rows, cols = (" + ".join(models) for models in (_models(self.rows), _models(self.cols)))
        return f"Similarity({self.measure!r}, {len(self.rows)} x {len(self.cols)} layers: {rows} x {cols})"

    def _repr_html_(self) -> str:
        """A small heatmap with its caption, for notebooks."""
        html: str = import_module(_DRAWN_BY).html_of(self)
        return html

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the values as a heatmap with matplotlib. Nothing is shown or saved: see ``plot(...).figure``.

        For a heatmap per pair of models in one figure, see `cka_probe.plot_pairs`; for one pair, `between`.

        Args:
            ax: drawn into; a new figure's where None.
            options: ``vmin``, ``vmax`` and ``colorbar`` of `cka_probe.plot_heatmap`.

        Returns:
            The axes: the layers of one model against those of another; or all layers of all models, with lines between
            the models.
        """
        axes: Axes = import_module(_DRAWN_BY).draw_heatmap(self, ax, **options)
        return axes

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of the rows and then of the columns, each once."""
        return _models((*self.rows, *self.cols))

    def between(self, row_model: str, col_model: str) -> Similarity:
        """The block of one pair: the layers of ``row_model`` against those of ``col_model``.

        Raises:
            SpecError: the rows hold no layer of the one, or the columns none of the other.
        """
        picked = []
        for model, layers, axis in ((row_model, self.rows, "row"), (col_model, self.cols, "column")):
            indices = [index for index, layer in enumerate(layers) if layer.model == model]
            if not indices:
                raise SpecError(f"No {axis} belongs to a model named {model!r}. There are: {_quoted(_models(layers))}.")
            picked.append(indices)
        block = np.ix_(*picked)
        curve, (rows, cols) = self.curve, block
        return replace(
            self,
            values=self.values[block],
            std_error=self.std_error[block],
            null=self.null[block],
            rows=tuple(self.rows[index] for index in picked[0]),
            cols=tuple(self.cols[index] for index in picked[1]),
            p_value=None if self.p_value is None else self.p_value[block],
            p_value_max=None if self.p_value_max is None else self.p_value_max[block],
            batches=None if self.batches is None else self.batches[block],
            curve=curve and Curve(curve.examples, curve.values[:, rows, cols], curve.std_error[:, rows, cols]),
            influence=tuple(one for one in self.influence if {one.row.model, one.col.model} == {row_model, col_model}),
        )

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The lower and the upper bound of a confidence interval, each (rows, cols).

        Student's t over the effective batches, or over the blocks of the jackknife. For measures that end at 1, except
        CKA, it is computed on Fisher's scale arctanh. It is an interval for the mean of the measure at this number of
        examples, so it does not include the bias of the estimator there (see ``curve``). Its coverage:
        ``benchmarks/intervals.csv``.

        Args:
            level: of confidence, between 0 and 1.

        Raises:
            SpecError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise SpecError(f"The level of an interval must be between 0 and 1, but is {level}.")
        from scipy.stats import t

        made = self.provenance
        counted = (made.batches or 0) if made.blocks is None else made.blocks
        draws = np.asarray(counted if self.batches is None else self.batches)
        reach = t.ppf((1 + level) / 2, np.maximum(draws - 1, 1)) * self.std_error
        if not about(self.measure).fisher_interval:
            return self.values - reach, self.values + reach
        # A value of exactly 1 has no error, and is its own interval.
        inside = np.abs(self.values) < 1
        middle = np.arctanh(self.values, where=inside, out=np.full(self.values.shape, np.inf) * np.sign(self.values))
        stretched = np.divide(reach, 1 - self.values**2, where=inside, out=np.zeros_like(reach))
        return np.tanh(middle - stretched), np.tanh(middle + stretched)

    def to_frame(self) -> DataFrame:
        """One row a cell: row_model, row_layer, col_model, col_layer, measure, value, std_error, null.

        With p_value and p_value_max at the end, where there was a permutation test. row_layer and col_layer are
        ordered categories, so that ``frame.pivot(index="row_layer", columns="col_layer", values="value")`` keeps the
        order of the layers.
        """
        parts = {"value": self.values, "std_error": self.std_error, "null": self.null}
        tests = {"p_value": self.p_value, "p_value_max": self.p_value_max}
        return self._frame({**parts, **{name: test for name, test in tests.items() if test is not None}})

    def curve_frame(self) -> DataFrame:
        """One row a cell and number of examples: the labels of `to_frame`, examples, value, std_error.

        Raises:
            SpecError: there is no curve.
        """
        from pandas import concat

        if self.curve is None:
            raise SpecError("There is no curve: compare with curve=True, or --curve.")
        frame: DataFrame = concat(
            [
                self._frame({"value": values, "std_error": errors}).assign(examples=examples)
                for examples, values, errors in zip(
                    self.curve.examples.tolist(), self.curve.values, self.curve.std_error, strict=True
                )
            ],
            ignore_index=True,
        )
        return frame

    def _frame(self, parts: Mapping[str, NDArray[np.float64]]) -> DataFrame:
        from pandas import Categorical, DataFrame

        row, col = (index.ravel() for index in np.indices(self.values.shape))
        labels: dict[str, Any] = {}
        for side, layers, index in (("row", self.rows, row), ("col", self.cols, col)):
            models, names = ([utf8(label) for label in part] for part in zip(*layers, strict=True))
            order = list(dict.fromkeys(names))
            labels[f"{side}_model"] = np.array(models, dtype=object)[index]
            labels[f"{side}_layer"] = Categorical(np.array(names, dtype=object)[index], order, ordered=True)
        numbers = {name: part.ravel() for name, part in parts.items()}
        frame: DataFrame = DataFrame({**labels, "measure": self.measure, **numbers})
        return frame

    def save(self, path: str | Path) -> None:
        """Write everything into one npz file, whole or not at all; `load` reads it back.

        Raises:
            OutputError: the file cannot be written.
        """
        path = Path(path)
        labels = {
            "rows": self.rows, "cols": self.cols, "measure": self.measure, "provenance": self.provenance.as_record(),
            "influence": self.influence,
        }  # fmt: skip
        arrays = {name: getattr(self, name) for name in _MATRICES}
        if self.curve is not None:
            arrays |= {f"curve_{name}": getattr(self.curve, name) for name in _CURVE}
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:  # a path would get '.npz' appended
                np.savez_compressed(
                    file,
                    format=np.array(FORMAT),
                    labels=np.array(json.dumps(labels)),
                    **{name: array for name, array in arrays.items() if array is not None},
                )
            aside.replace(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Similarity:
        """Read what `save` wrote.

        Raises:
            OutputError: the file is not there, or is not such a file.
        """
        try:
            require_regular(path)
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                file_format = int(file["format"])
                if file_format > FORMAT:
                    raise OutputError(f"{path} was written by a newer cka-probe (format {file_format}).")
                labels = json.loads(str(file["labels"]))
                values, std_error, null = (_numbers(file, name) for name in ("values", "std_error", "null"))
                others = {name: _numbers(file, name) for name in _MATRICES[3:] if name in file}
                curve = Curve(*(_numbers(file, f"curve_{name}") for name in _CURVE)) if "curve_values" in file else None
            rows, cols = (tuple(_layer(layer) for layer in labels[axis]) for axis in ("rows", "cols"))
            measure, record = _text(labels["measure"]), _mapping(labels["provenance"])
            if file_format < 2:
                measure = _spec_of(measure, record)
            provenance = Provenance.from_record(record, path)
            influence = tuple(
                Influence(_text(example), _layer(row), _layer(col), float(change))
                for example, row, col, change in labels.get("influence", ())
            )
            return cls(
                values, std_error, null, rows, cols, measure, provenance, **others, curve=curve, influence=influence,
            )  # fmt: skip
        except OutputError:  # a whole file, but of a newer format, or with other types
            raise
        except Exception as error:  # of a damaged file, the readers of NumPy, zip and JSON raise anything
            # NumPy's advice on a file of another kind is to unpickle it, which can run any code.
            why = "it is no npz file" if "pickle" in str(error) else reason(error)
            raise OutputError(f"{path} is not a similarity saved by cka-probe: {why}") from error


def _spec_of(name: str, record: Mapping[str, Any]) -> str:
    """The spec of a measure whose options format 1 has in the provenance alone; the name where that says no more."""
    words = ["biased" if record.get("debiased") is False else None]
    words += [record.get(key) for key in ("threshold", "median", "rdm", "neighbours")]
    if name == "rsa":
        words.append(record.get("rdm_comparison"))
    if name == "mantel":
        words.append(record.get("permutations"))
    try:
        return str(parse_measure(":".join([name.removesuffix("-biased"), *(str(word) for word in words if word)])))
    except SpecError:
        return name


def _numbers(file: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    array = file[name]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, but are {array.dtype}")
    return array


def _layer(label: Any) -> Layer:
    model, name = label
    return Layer(_text(model), _text(name))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text must stand where {str(value)[:40]!r} does")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"the provenance must be a mapping, but is {type(value).__name__}")
    return value


def _models(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.model for layer in layers))


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
