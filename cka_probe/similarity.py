"""Similarity: the result object, with its labels, its uncertainty and where it came from."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import OutputError, SpecError

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = 1
"""Of the npz file; raised when its fields change."""


class Layer(NamedTuple):
    """One row or column: a layer of a model, by their names."""

    model: str
    name: str

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


@dataclass(frozen=True, eq=False)
class Similarity:
    """How similar each row's layer is to each column's, with its uncertainty.

    Attributes:
        values: (rows, cols) float64, read-only; NaN in the rows and columns of layers that are constant.
        std_error: (rows, cols) float64, read-only: the standard error of each value; NaN where the data were one batch.
        null: (rows, cols) float64, read-only: the same measure on shuffled examples. Its spread is the noise floor.
        rows: the layers of the rows, in forward order, model by model.
        cols: the layers of the columns.
        measure: the name of the measure, such as ``"cka"``.
        provenance: how the values were made: subjects, data, options, versions. Plain values, fit for JSON and YAML.
    """

    values: NDArray[np.float64]
    std_error: NDArray[np.float64]
    null: NDArray[np.float64]
    rows: tuple[Layer, ...]
    cols: tuple[Layer, ...]
    measure: str = "cka"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.rows), len(self.cols))
        for name in ("values", "std_error", "null"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != shape:
                raise ValueError(f"{name} must have the shape (rows, cols) = {shape}, but has {array.shape}.")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __repr__(self) -> str:
        rows, cols = (" + ".join(models) for models in (_models(self.rows), _models(self.cols)))
        return f"Similarity({self.measure!r}, {len(self.rows)} x {len(self.cols)} layers: {rows} x {cols})"

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
        return Similarity(
            self.values[block],
            self.std_error[block],
            self.null[block],
            tuple(self.rows[index] for index in picked[0]),
            tuple(self.cols[index] for index in picked[1]),
            self.measure,
            self.provenance,
        )

    def interval(self, level: float = 0.95) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The lower and the upper bound of a confidence interval, each (rows, cols): Student's t over the batches.

        Args:
            level: of confidence, between 0 and 1.

        Raises:
            SpecError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise SpecError(f"The level of an interval must be between 0 and 1, but is {level}.")
        from scipy.stats import t

        batches = self.provenance.get("batches", 0)
        reach = t.ppf((1 + level) / 2, max(batches - 1, 1)) * self.std_error
        return self.values - reach, self.values + reach

    def to_frame(self) -> DataFrame:
        """One row a cell: row_model, row_layer, col_model, col_layer, measure, value, std_error, null."""
        from pandas import DataFrame

        row, col = (index.ravel() for index in np.indices(self.values.shape))
        labels = {
            f"{side}_{part}": np.array([getattr(layer, attribute) for layer in layers], dtype=object)[index]
            for side, layers, index in (("row", self.rows, row), ("col", self.cols, col))
            for part, attribute in (("model", "model"), ("layer", "name"))
        }
        numbers = {"value": self.values.ravel(), "std_error": self.std_error.ravel(), "null": self.null.ravel()}
        frame: DataFrame = DataFrame({**labels, "measure": self.measure, **numbers})
        return frame

    def save(self, path: str | Path) -> None:
        """Write everything into one npz file, whole or not at all; `load` reads it back.

        Raises:
            OutputError: the file cannot be written.
        """
        path = Path(path)
        labels = {"rows": self.rows, "cols": self.cols, "measure": self.measure, "provenance": dict(self.provenance)}
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:  # a path would get '.npz' appended
                np.savez_compressed(
                    file,
                    format=np.array(FORMAT),
                    values=self.values,
                    std_error=self.std_error,
                    null=self.null,
                    labels=np.array(json.dumps(labels)),
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
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) > FORMAT:
                    raise OutputError(f"{path} was written by a newer cka-probe (format {int(file['format'])}).")
                labels = json.loads(str(file["labels"]))
                arrays = [file[name] for name in ("values", "std_error", "null")]
            rows, cols = (tuple(Layer(*layer) for layer in labels[axis]) for axis in ("rows", "cols"))
            values, std_error, null = arrays
            return cls(values, std_error, null, rows, cols, labels["measure"], labels["provenance"])
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
            # NumPy's advice on a file of another kind is to unpickle it, which can run any code.
            reason = "it is no npz file" if "pickle" in str(error) else error
            raise OutputError(f"{path} is not a similarity saved by cka-probe: {reason}") from error


def _models(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.model for layer in layers))


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
