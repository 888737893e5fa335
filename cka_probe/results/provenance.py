"""Provenance: how the values of a similarity were made, as typed attributes; read from and written as a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from cka_probe.runtime.records import Optional, Shape, check

_SHAPE: Shape = {
    "data?": {
        "source": str, "examples": int, "images?": (int, None), "sample_sha256?": str, "paired?": str,
        "duplicates?": {"images": int, "pairs": [[str, str]]}, "broken?": [{"image": str, "error": str}],
    },
    "subjects?": [
        {
            "name": str, "spec?": Optional, "weights?": Optional, "parameters?": int, "features?": {str: int},
            "model?": str, "stored?": str, "left_out?": {str: str},
            "preprocessing?": ({"size": [int, int, int], "interpolation": Optional, "crop_pct": Optional}, str),
            "view?": {"name": str, "package?": str, "pixels?": int},
        }
    ],
    "versions?": {str: Optional}, "layers?": ([str], str), "batch_size?": int, "batches?": int, "blocks?": int,
    "debiased?": (bool, None), "amp?": (bool, None), "kernel?": (str, None), "threshold?": float, "rdm?": str,
    "rdm_comparison?": str, "pool?": (str, None), "seed?": Optional, "device?": Optional,
}  # fmt: skip

_OWN = ("others", "order")  # fields that are no key of a record

R = TypeVar("R", bound="_Record")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """Attributes that stand for the keys of a mapping.

    Attributes:
        others: the keys that have no attribute, with plain values.
        order: the keys of the mapping that this was read from, in their order.
    """

    others: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = field(default=(), repr=False, compare=False)

    _parts: ClassVar[Mapping[str, type[_Record]]] = {}  # attribute -> what it, or each of its items, is

    @classmethod
    def _of(cls: type[R], record: Mapping[str, Any]) -> R:
        known = {one.name for one in fields(cls)} - set(_OWN)
        values = {key: cls._part(key, value) for key, value in record.items() if key in known}
        others = {key: value for key, value in record.items() if key not in known}
        return cls(**values, others=others, order=tuple(record))

    @classmethod
    def _part(cls, key: str, value: Any) -> Any:
        if key not in cls._parts:
            return value
        part = cls._parts[key]
        return part._of(value) if isinstance(value, Mapping) else tuple(part._of(one) for one in value)

    def as_record(self) -> dict[str, Any]:
        """The mapping of plain values that this stands for, its keys in the order in which they were read."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _OWN}
        known = {key: value for key, value in values.items() if key in self.order or value not in (None, (), {})}
        found = {**known, **self.others}
        ordered = [key for key in self.order if key in found]
        return {key: _plain(found[key], key in self._parts) for key in dict.fromkeys([*ordered, *found])}


def _plain(value: Any, part: bool) -> Any:
    if not part or value is None:
        return value
    return value.as_record() if isinstance(value, _Record) else [one.as_record() for one in value]


@dataclass(frozen=True, kw_only=True)
class Duplicates(_Record):
    """Images that are exact copies of earlier ones.

    Attributes:
        images: how many are copies.
        pairs: the names of the first few: the earlier image, and its copy.
    """

    images: int
    pairs: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Broken(_Record):
    """An image that could not be read.

    Attributes:
        image: its name.
        error: why.
    """

    image: str
    error: str


@dataclass(frozen=True, kw_only=True)
class DataRecord(_Record):
    """The images of a run.

    Attributes:
        source: the name of the data.
        examples: how many images were used.
        images: how many the source holds; None where that is not known.
        sample_sha256: SHA-256 of the names of the chosen images, in order; None where it was not recorded.
        paired: the name of the folder of partners; None where there was none.
        duplicates: the copies among the images; None where there are none.
        broken: the images that were left out since they could not be read.
    """

    source: str
    examples: int
    images: int | None = None
    sample_sha256: str | None = None
    paired: str | None = None
    duplicates: Duplicates | None = None
    broken: tuple[Broken, ...] = ()

    _parts: ClassVar[Mapping[str, type[_Record]]] = {"duplicates": Duplicates, "broken": Broken}


@dataclass(frozen=True, kw_only=True)
class ViewRecord(_Record):
    """The view through which a subject saw the images; ``others`` holds its parameters.

    Attributes:
        name: its spec.
        package: the package that it comes from, with its version; None where it is our own.
        pixels: of an image; None where the view does not tell it.
    """

    name: str
    package: str | None = None
    pixels: int | None = None


@dataclass(frozen=True, kw_only=True)
class SubjectRecord(_Record):
    """One of the networks, or sets of stored features, that were compared.

    Attributes:
        name: as in the labels of the layers.
        spec: of the model; None where it was given as a module or as an array.
        weights: where they come from.
        parameters: how many; None for stored features without a record.
        features: layer -> how many features it has.
        model: of one of several subjects of a model (views, sides of pairs): the name that they share.
        stored: the file or folder of stored features; None for a network that ran.
        left_out: layer -> why it could not be compared.
        preprocessing: ``size``, ``interpolation``, ``crop_pct`` and so on, or a sentence where there was none.
        view: through which it saw the images; None where that was not recorded.
    """

    name: str
    spec: Any = None
    weights: Any = None
    parameters: int | None = None
    features: Mapping[str, int] = field(default_factory=dict)
    model: str | None = None
    stored: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] | str | None = None
    view: ViewRecord | None = None

    _parts: ClassVar[Mapping[str, type[_Record]]] = {"view": ViewRecord}


@dataclass(frozen=True, kw_only=True)
class Provenance(_Record):
    """How the values of a similarity were made. An attribute is None, or empty, where it was not recorded.

    Attributes:
        subjects: what was compared, in order.
        data: the images.
        layers: the selection of layers.
        batch_size: images a forward pass.
        pool: how activations became features: ``"none"``, ``"mean"`` or ``"cls"``.
        amp: whether the networks ran under autocast to bfloat16.
        device: on which they ran.
        plan: of a run within a memory limit: its passes, sizes in bytes, and the measured peak.
        seed: of the images, the shuffled control and the permutations.
        processes: how many shared the work.
        versions: package -> version.
        seconds: of the run.
        batches: over which CKA was averaged; None for measures of all images at once.
        blocks: of the jackknife of measures of all images at once, 0 where there were too few images; None for CKA.
        debiased: whether the estimator is debiased; None where the measure has no such choice.
        kernel: of CKA.
        threshold: of the RBF kernel: its bandwidth as a share of the median distance.
        rdm: the distance in the matrices of RSA.
        rdm_comparison: how RSA compares two matrices.
        others: what else a measure recorded.
    """

    subjects: tuple[SubjectRecord, ...] = ()
    data: DataRecord | None = None
    layers: Sequence[str] | str | None = None
    batch_size: int | None = None
    pool: str | None = None
    amp: bool | None = None
    device: Any = None
    plan: Any = None
    seed: Any = None
    processes: Any = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    seconds: Any = None
    batches: int | None = None
    blocks: int | None = None
    debiased: bool | None = None
    kernel: str | None = None
    threshold: float | None = None
    rdm: str | None = None
    rdm_comparison: str | None = None

    _parts: ClassVar[Mapping[str, type[_Record]]] = {"subjects": SubjectRecord, "data": DataRecord}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], path: str | Path = "The record") -> Provenance:
        """The provenance that a mapping of plain values tells, as `as_record` gives it; further keys are kept.

        Args:
            record: the mapping.
            path: the file that holds it, for messages.

        Raises:
            OutputError: a value has another type.
        """
        check(Path(path), record, _SHAPE, "its provenance")
        return cls._of(record)

    def extended(self, more: Mapping[str, Any]) -> Provenance:
        """This with more keys, or other values of its keys; new keys come last.

        Raises:
            OutputError: a value has another type.
        """
        return Provenance.from_record({**self.as_record(), **more})
