"""The options of a run, in groups: the only home of their defaults, checks and help.

Importing this loads nothing heavy. A group is frozen. The annotation of a field says what it may be: a type, a
`Literal`, or a `Range` of numbers; the text below it is its help on the command line. The library functions take the
fields of their groups as keywords, with the same names and defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from cka_probe.activations.pooling import Pool
from cka_probe.errors import SpecError
from cka_probe.runtime.paths import usable_path
from cka_probe.runtime.ranges import IMAGE_SIZE, LEAST_EXAMPLES, SEED, Range, check_choice, flag, shown

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from cka_probe.estimation.measure import Measure
    from cka_probe.images.sources.source import ImageSource
    from cka_probe.images.views import ImageFunction, View

    Data = str | Path | Dataset[Any] | Tensor | ImageSource
    Views = str | Sequence[str | ImageFunction | View]
    Layers = str | Sequence[str]
    Measures = str | Measure | Sequence[str | Measure]
    Folder = str | Path
    Bytes = str | int
    Channels = Sequence[float]
else:  # on the command line
    _TEXT = PrimitiveConstructorSpec(1, "STR", lambda texts: texts[0], lambda _: True, lambda value: [str(value)])
    Data = Views = Layers = Measures = Bytes = Annotated[str, _TEXT]
    Folder = Path
    Channels = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options. NumPy's numbers become Python's, and sequences of numbers become tuples."""

    def __post_init__(self) -> None:
        """Take numbers as a record or a checkpoint can hold them."""
        for name, (_, range_) in _annotations(type(self)).items():
            if range_ is not None:
                object.__setattr__(self, name, _plain(getattr(self, name)))

    def check(self) -> None:
        """Check what can be checked before images or networks are loaded.

        Raises:
            SpecError: an option has a value that it cannot have; the message names its flag.
        """
        for name, (kind, range_) in _annotations(type(self)).items():
            value = getattr(self, name)
            if range_ is not None:
                range_.check(flag(name), value)
                continue
            choices, optional = _choices(kind)
            if choices:
                check_choice(name, value, (*choices, *((None,) if optional else ())))
            elif kind is bool and not isinstance(value, bool):
                raise SpecError(f"{flag(name)} must be true or false, but is {shown(value)}.")
            elif not isinstance(value, str) and (kind is str or (kind == str | None and value is not None)):
                raise SpecError(f"{flag(name)} must be a text, but is {shown(value)}.")


@dataclass(frozen=True, kw_only=True)
class DataSet(Options):
    """Which images."""

    data: Data = "digits"
    """digits (bundled), a folder of images, or a data set of timm's: torch/cifar100, hfds/..., wds/..., tfds/..."""

    data_dir: str | None = None
    """Folder of a data set such as torch/cifar100."""

    download: bool = False
    """Download the data set if it is not there."""

    full_scale: Annotated[float | None, Range(open_low=True, optional=True)] = None
    """Pixel value of white in images of more than 8 bits, such as 4095 for 12-bit images in 16-bit files. Default:
    65535 for 16 bits; required for 32-bit and floating-point images."""

    skip_broken: bool = False
    """Skip images that cannot be read, and list them. Without it, the first one is an error. Reads all images once
    before the run."""

    image_size: Annotated[int | None, IMAGE_SIZE] = None
    """Height and width of the input of every model. Default: each model's own."""

    def check(self) -> None:
        """As `Options.check`; the data set, or its folder, must be there."""
        from cka_probe.probing.option_checks import check_data

        super().check()
        check_data(self.data, self.data_dir, download=self.download)


@dataclass(frozen=True, kw_only=True)
class Images(DataSet):
    """Which images, and how the networks see them."""

    split: str | None = None
    """Split of the data: train, validation, or the data set's own name for it. Default: validation, if available."""

    paired: Folder | None = None
    """Folder with a partner of each image in --data, matched by relative path. Each model runs on both folders."""

    views: Annotated[Views, arg(name="view")] = "identity"
    """Transforms of the images: identity, gray, blur:SIGMA, jpeg:QUALITY, noise:STD, catvision, file.py:function;
    several separated by commas. Each model runs once per view."""

    examples: Annotated[int, LEAST_EXAMPLES] = 2048
    """Number of images: a random subset, fixed by the seed."""

    mean: Annotated[Channels | None, Range(-1000, 1000, many=True, optional=True)] = None
    """Mean per channel for normalization, with pixels from 0 to 1, for every model. Default: each model's own."""

    std: Annotated[Channels | None, Range(0, 1000, open_low=True, many=True, optional=True)] = None
    """Standard deviation per channel for normalization, with pixels from 0 to 1, for every model. Default: each model's
    own."""

    seed: Annotated[int, SEED] = 0
    """Seed of the subset and the order of the images, and of shuffled controls and permutation tests."""

    def check(self) -> None:
        """As `DataSet.check`; views and paired folders must be ones."""
        from cka_probe.probing.option_checks import check_data, check_options_of_data, check_views

        super().check()
        check_options_of_data(self.data, self.data_dir, self.split, download=self.download)
        if self.paired is not None:
            check_data(self.paired, None, what="--paired")
        check_views(self.views)


@dataclass(frozen=True, kw_only=True)
class Selection(Options):
    """Which layers."""

    layers: Layers = "blocks"
    """Layers to compare: blocks, stages, all, globs (layer*.1, **.attn), type:Conv2d; several separated by commas."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Selection):
    """Which layers, and what of them."""

    pool: Pool | None = None
    """Pooling of activations. none: keep all values. mean: over space or tokens. cls: the class token if there is one,
    else the mean. Default: none for CKA; mean for other measures and for extract."""


@dataclass(frozen=True, kw_only=True)
class Measuring(FeatureOptions):
    """What is measured."""

    measures: Measures = "cka"
    """Similarity measures: cka (linear), cka:biased, cka-rbf:0.8, rsa:euclidean:kendall, mantel:9999, mutual-knn:20,
    svcca:0.95, ...; several separated by commas. List all with their options: cka-probe measures."""

    permutations: Annotated[int, Range(0, 10**6, whole=True)] = 0
    """Permutations for the permutation test of each value; 0: no test. CKA permutes within batches, other measures
    permute the first 2,048 images. mantel sets its own number: mantel:9999."""

    curve: bool = False
    """Also evaluate on up to six smaller numbers of images, each half the next: curve.csv and curve.png."""

    influence: Annotated[int, Range(0, 10**6, whole=True)] = 0
    """List the N images per model pair that change CKA most: influence.csv."""

    def parsed(self) -> tuple[Measure, ...]:
        """The measures.

        Raises:
            SpecError: one is no measure, two are equal, or there is none.
        """
        from cka_probe.measures.catalogue import parse_measures

        return parse_measures(self.measures)

    def check(self) -> None:
        """As `Options.check`; the measures must be ones."""
        super().check()
        chosen = self.parsed()
        if self.influence and not any(measure.gram_bytes for measure in chosen):
            named = ", ".join(map(str, chosen))
            raise SpecError(f"--influence needs CKA, but the measures are {named}. Add cka to --measures.")


@dataclass(frozen=True, kw_only=True)
class Hardware(Options):
    """Where it runs."""

    device: str = "auto"
    """Device: auto (CUDA if available), cpu, cuda, cuda:1, ..."""

    workers: Annotated[int | None, Range(0, 1024, whole=True, optional=True)] = None
    """Worker processes that decode images. Default: number of cores minus one; 0 for small images in memory."""


@dataclass(frozen=True, kw_only=True)
class Execution(Hardware):
    """Where and how the networks run."""

    batch_size: Annotated[int, Range(4, 10**6, whole=True, reason="the debiased CKA needs 4 images a batch")] = 128
    """Images per forward pass. Larger batches give a less noisy estimate of CKA."""

    amp: bool = False
    """Run the networks under autocast to bfloat16; Gram matrices and sums keep their precision."""

    resume: bool = False
    """Resume the run in --out, or start it if there is none. The other options must be the same."""

    checkpoint_minutes: Annotated[float, Range(0, 10**6)] = 5.0
    """Minutes between checkpoints, from which a run can be resumed."""


@dataclass(frozen=True, kw_only=True)
class Running(Execution):
    """Where and how it runs."""

    memory: Bytes | None = None
    """Memory limit, such as 8GB, 500MB or 6GiB: of the GPU if the networks run on one, else of the process. Networks
    that do not fit together run one after the other, with the same result. Prints a plan before the run."""

    scratch: Folder | None = None
    """Folder for features that exceed 3 GiB of memory and, with --memory, for weights and Gram matrices. Default: the
    system's folder for temporary files."""

    def check(self) -> None:
        """As `Options.check`; the scratch folder is made and tried, as it will be when it is needed."""
        from cka_probe.estimation.feature_store import Scratch
        from cka_probe.runtime.sizes import parse_bytes

        super().check()
        if self.memory is not None:
            parse_bytes(self.memory)
            if self.resume:
                raise SpecError(
                    "--memory and --resume exclude each other: a run with --memory has no checkpoints. Drop one of "
                    "the two."
                )
        if self.scratch is not None:
            Scratch(usable_path(self.scratch, "--scratch"))


def check_run(models: Any, images: Images, features: FeatureOptions, running: Execution) -> None:
    """Raise a SpecError where a comparison or an extraction cannot be done with these options.

    Args:
        models: as for `cka_probe.compare`.
        images: which.
        features: which layers; what is measured.
        running: where and how.
    """
    from cka_probe.probing.option_checks import check_models, check_names

    for group in (features, images, running):
        group.check()
    if isinstance(features, Measuring):
        for measure in features.parsed():
            measure.check(images.examples)
    check_models(models)
    check_names(models)


def recorded_options(command: Any) -> dict[str, Any]:
    """The options of a command by their names, those of its groups among them, fit for a record."""
    found: dict[str, Any] = {}
    for field in fields(command):
        value = getattr(command, field.name)
        if isinstance(value, Options):
            found |= recorded_options(value)
        else:
            found[field.name] = str(value) if isinstance(value, Path) else value
    return found


def _annotations(group: type[Options]) -> dict[str, tuple[Any, Range | None]]:
    """For each option its type, and its range where it is a number."""
    found: dict[str, tuple[Any, Range | None]] = {}
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, *more = get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        if any(isinstance(one, PrimitiveConstructorSpec) for one in more):
            kind = Any  # a text on the command line alone
        found[field.name] = kind, next((one for one in more if isinstance(one, Range)), None)
    return found


def _choices(kind: Any) -> tuple[tuple[Any, ...], bool]:
    """The choices of a `Literal`, and whether None is one more; none of another type."""
    if get_origin(kind) is Literal:
        return get_args(kind), False
    parts = get_args(kind)
    literal = next((part for part in parts if get_origin(part) is Literal), None)
    return (get_args(literal), type(None) in parts) if literal is not None else ((), False)


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
