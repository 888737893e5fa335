"""Features that are there already, as subjects: what `cka_probe.extract` wrote, safetensors, npy, npz, and arrays."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.activations.layers import glob
from cka_probe.errors import DataError, FeatureError, SpecError
from cka_probe.estimation.arrays import LARGEST_EXPONENT
from cka_probe.probing.feature_files import BFloat16, mapped
from cka_probe.runtime.files import reason, require_regular
from cka_probe.runtime.names import unquoted
from cka_probe.runtime.records import Optional, check, read_mapping

SUFFIXES = (".npy", ".npz", ".safetensors")
SAMPLES = "samples.txt"
"""Of a folder of features: the identities of the examples, one a line, in the order of the rows."""

_RECORD = {
    "result": {
        "subjects": [{"name": str, "file": str, "spec?": Optional, "weights?": Optional, "model?": str}],
        "pool": str,
        "data": {
            "source": str,
            "duplicates?": {"images": int, "pairs": [[str, str]]},
            "broken?": [{"image": str, "error": str}],
        },
    }
}

_WHOLE = ("blocks", "stages", "all")  # selections that were made when the features were
_FINGERPRINTED = 100  # rows


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """A subject whose network has run already.

    Attributes:
        name: labels its rows and columns.
        layers: name -> (n, d) floating-point features, the same n for all. They may lie on disk.
        samples: the identities of the examples, in order; None where they are not known.
        source: where the features come from, for the record.
        data: the record of the data that they were made of, where it is known.
    """

    name: str
    layers: Mapping[str, NDArray[Any]]
    samples: tuple[str, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, features in self.layers.items():
            shape = np.shape(features)
            if features.dtype.kind not in "fiub" or len(shape) != 2 or 0 in shape:
                raise FeatureError(
                    f"Features must be real numbers of shape (examples, features), but {layer!r} of {self.name!r} is "
                    f"{features.dtype} of shape {shape}. Flatten or average each example first."
                )
        counts = {layer: len(features) for layer, features in self.layers.items()}
        if len(set(counts.values())) != 1:
            raise FeatureError(
                f"All layers of {self.name!r} must hold the same examples, but they have "
                f"{', '.join(f'{count} ({layer})' for layer, count in list(counts.items())[:4]) or 'none'}."
            )
        if self.samples is not None and len(self.samples) != len(self):
            raise FeatureError(
                f"{self.name!r} must have a name for each example, but has {len(self)} rows and {len(self.samples)} "
                "names."
            )

    def __len__(self) -> int:
        return len(next(iter(self.layers.values())))

    def fingerprint(self) -> str:
        """A hash, 16 hexadecimal digits, of the names and shapes of the layers, and of a hundred of the rows."""
        rows = np.unique(np.linspace(0, len(self) - 1, _FINGERPRINTED, dtype=np.int64))
        digest = hashlib.sha256()
        for layer, features in self.layers.items():
            digest.update(f"{layer!a} {features.dtype} {features.shape}".encode())
            digest.update(np.ascontiguousarray(features[rows]).tobytes())
        return digest.hexdigest()[:16]

    def of_rows(self, rows: NDArray[np.int64]) -> StoredFeatures:
        """The features of some of the examples, by their rows; what lies on disk stays there."""
        layers: dict[str, Any] = {name: _Rows(features, rows) for name, features in self.layers.items()}
        samples = None if self.samples is None else tuple(self.samples[row] for row in rows.tolist())
        return replace(self, layers=layers, samples=samples)

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The layers that any of the patterns of ``--layers`` picks; all, for ``blocks``, ``stages`` and ``all``."""
        return [
            layer
            for layer in self.layers
            if any(pattern in _WHOLE or glob(pattern).fullmatch(layer) for pattern in patterns)
        ]


class _Rows:
    """As much of an array as stored features need, of some of its rows."""

    def __init__(self, array: NDArray[Any], rows: NDArray[np.int64]) -> None:
        self._array, self._rows = array, rows
        self.dtype, self.shape = array.dtype, (len(rows), *array.shape[1:])
        self.epsilon = epsilon_of(array)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        return np.asarray(self._array[self._rows[rows]])


@dataclass
class StoredExamples:
    """The rows of stored features as an image source without images."""

    name: str
    identities: Sequence[str]
    classes: None = None
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.identities)

    def read(self, index: int) -> tuple[Tensor, None]:
        raise DataError(f"{self.name} hold features of {self.identity(index)}, and no image.")

    def identity(self, index: int) -> str:
        return self.identities[index]

    def place(self, index: int) -> str:
        return self.identity(index)


def is_stored(spec: str) -> bool:
    """Whether a model spec is a file of features or a folder that `cka_probe.extract` wrote."""
    if spec.endswith(SUFFIXES) and "@" not in spec:
        return True
    return (_named(spec)[1] / SAMPLES).is_file()


def stored_path(spec: str) -> Path:
    """The file or folder that such a spec names."""
    return _named(spec)[1]


def read_stored(spec: str) -> list[StoredFeatures]:
    """The subjects that a spec names, ``name=`` before it or not: all those of a folder, or the one of a file.

    Raises:
        SpecError: there is no such file, or a name is given to several subjects.
        DataError: it cannot be read.
        FeatureError: it does not hold features of shape (n, d).
    """
    chosen, path = _named(spec)
    if not path.exists():
        raise SpecError(f"Stored features must be a file or folder that exists, but {path} does not.")
    try:
        found = _folder(path) if path.is_dir() else [_file(path)]
    except FeatureError:
        raise
    except Exception as error:  # of a damaged file the readers of NumPy, zip and safetensors raise anything
        # NumPy's advice on a file of another kind is to unpickle it, which can run any code.
        why = "it is no array of numbers" if "pickle" in str(error) else reason(error).rstrip(".")
        raise DataError(f"{path} must hold features (n, d), but cannot be read: {why}.") from error
    if chosen and len(found) > 1:
        raise SpecError(
            f"One name cannot cover the {len(found)} subjects of {path}. Name one of its files: "
            f"{chosen}={path / found[0].source['file']}."
        )
    return [replace(subject, name=chosen) for subject in found] if chosen else found


def as_stored(array: NDArray[Any] | Tensor, name: str) -> StoredFeatures:
    """An (n, d) array or tensor as a subject of one layer."""
    values: Any = array
    if isinstance(array, Tensor):
        tensor = array.detach().cpu()
        values = BFloat16(tensor) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return StoredFeatures(name, {"features": values}, None, {"stored": "an array"})


def epsilon_of(features: Any) -> float:
    """Of the type of an array of stored features; 0 where they are integers, which are exact."""
    if hasattr(features, "epsilon"):
        return float(features.epsilon)
    return float(np.finfo(features.dtype).eps) if features.dtype.kind == "f" else 0.0


def exponent_of(features: Any) -> int:
    """The exponent of the largest of the first rows, where squares of such features leave float64; else 0."""
    if features.dtype != np.float64:
        return 0
    rows = np.abs(features[np.arange(min(len(features), _FINGERPRINTED))])
    exponent = int(np.frexp(rows.max())[1])
    return exponent if abs(exponent) > LARGEST_EXPONENT else 0


def stored_examples(subjects: Sequence[StoredFeatures]) -> StoredExamples:
    """The examples that all of the subjects hold.

    Raises:
        DataError: they hold not as many, or other ones.
    """
    first = subjects[0]
    for other in subjects[1:]:
        if len(other) != len(first):
            raise DataError(
                f"Stored features must be of the same examples in the same order, but {first.name!r} has {len(first)} "
                f"rows and {other.name!r} {len(other)}."
            )
    known = {subject.name: subject.samples for subject in subjects if subject.samples is not None}
    (name, identities), *others = known.items() or [("", tuple(map(str, range(len(first)))))]
    for other_name, samples in others:
        if samples != identities:
            raise _different(name, identities, other_name, samples)
    sources = {str(subject.data.get("source", "stored features")) for subject in subjects}
    return StoredExamples(sources.pop() if len(sources) == 1 else "stored features", identities)


def check_same_samples(subject: StoredFeatures, identities: Sequence[str]) -> None:
    """Raise a DataError where the first rows of stored features are not known to be these examples, in this order."""
    if subject.samples is None:
        raise DataError(
            f"Features can be compared with a network only if their examples are known to be the same in the same "
            f"order, but {subject.name!r} does not record its examples. Extract the network's features first, and "
            "compare those."
        )
    if subject.samples[: len(identities)] != tuple(identities):
        raise _different("the images", identities, subject.name, subject.samples)


def _different(name: str, own: Sequence[str], other: str, others: Sequence[str]) -> DataError:
    shared = len(set(own) & set(others))
    how = "in another order" if shared == len(own) == len(others) else f"with {shared} in common"
    return DataError(
        f"Features must be of the same examples in the same order, but {name} and {other} hold {len(own)} and "
        f"{len(others)}, {how}. Use the same --data, --split, --examples and --seed for both."
    )


def _named(spec: str) -> tuple[str | None, Path]:
    named = re.fullmatch(r"([^=,@/\\:]+)=(.+)", spec)
    name, text = named.groups() if named else (None, spec)
    return name, Path(text).expanduser()


def _folder(path: Path) -> list[StoredFeatures]:
    recorded = read_mapping(path / "run.yaml")
    check(path / "run.yaml", recorded, _RECORD)
    record = recorded["result"]
    require_regular(path / SAMPLES)
    samples = tuple(map(unquoted, (path / SAMPLES).read_text(encoding="utf-8").split("\n")))
    return [
        StoredFeatures(
            subject["name"], mapped(path / subject["file"]), samples,
            {**subject, "stored": str(path), "pool": record["pool"]}, record["data"],
        )
        for subject in record["subjects"]
    ]  # fmt: skip


def _file(path: Path) -> StoredFeatures:
    if (path.parent / SAMPLES).is_file() and path.suffix == ".safetensors":
        of_folder = {subject.source["file"]: subject for subject in _folder(path.parent)}
        if path.name in of_folder:
            return of_folder[path.name]
    layers: Mapping[str, Any]
    if path.suffix == ".safetensors":
        layers = mapped(path)
    else:
        layers = _arrays(path)
    return StoredFeatures(path.stem, layers, None, {"stored": str(path)})


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npy`` file, which stays on disk, or of an ``.npz`` file, which does not."""
    require_regular(path)
    with warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")  # of sizes that overflow, and of headers of Python 2
        if file.read(2) != b"PK":
            return {"features": np.load(path, mmap_mode="r", allow_pickle=False)}
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    others = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]
    if others:
        raise DataError(f"its part {others[0]!r} is no array")
    return arrays
