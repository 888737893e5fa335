"""distill() with everything by keyword: what ``cka_probe.distill`` is in a notebook."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypedDict

from torch import nn

from cka_probe.distill.config import COMMON, Training, methods_with
from cka_probe.distill.methods import METHODS, Method, method_named
from cka_probe.distill.training.run.finish import Distilled
from cka_probe.distill.training.train import distill as train
from cka_probe.errors import SpecError
from cka_probe.networks.models import Subject
from cka_probe.probing.subjects import named_subjects
from cka_probe.runtime.ranges import listed

if TYPE_CHECKING:
    from typing_extensions import Unpack

Network = str | nn.Module | Subject


class TrainingOptions(TypedDict, total=False):
    """The options of `distill` that all methods share; ``cka-probe distill --help`` says what each does."""

    student_layers: str
    teacher_layers: str
    data_dir: str | None
    download: bool
    full_scale: float | None
    skip_broken: bool
    image_size: int | None
    validation: float
    probe_examples: int
    train: Literal["all", "head"]
    epochs: int
    patience: int | None
    batch_size: int
    accumulate: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    schedule: Literal["cosine", "step", "none"]
    decay_epochs: float
    min_lr: float
    warmup_epochs: float
    warmup_lr: float
    clip: float | None
    ema: float | None
    smoothing: float
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    color_jitter: float
    rand_augment: str | None
    mixup: float
    cutmix: float
    erasing: float
    device: str
    workers: int | None
    bf16: bool
    fp16: bool
    channels_last: bool
    compile: bool
    image_cache: float
    checkpoint_minutes: float
    teacher_cache: str | None
    teacher_cache_dtype: Literal["same", "float16"]
    tensorboard: bool
    seed: int


def distill(  # noqa: PLR0913  # public, keyword-only
    *,
    student: Network,
    teacher: Network | None = None,
    data: str = "digits",
    method: str | Method = "ofa",
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Unpack[TrainingOptions],
) -> Distilled:
    """Train a student from a teacher, or from labels alone.

    Args:
        student: a model spec; or a network or a `Subject`, of which a copy is trained.
        teacher: the same; not needed with ``method="none"``.
        data: a data spec with labels.
        method: its name, for its default options, or a value such as ``cka_probe.OFA(gamma=1.2)``.
        out: a folder for the files of the run, new or empty; None to keep none.
        overwrite: replace the files of an earlier run in ``out``.
        options: see `TrainingOptions`.

    Returns:
        The student in evaluation mode on the CPU, its accuracy and the teacher's on the test images, and the metrics,
        a row an epoch.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change. Subclasses: `cka_probe.errors`.

    For example, without files, on the bundled digits::

        done = cp.distill(student="zoo:mlp@random", teacher="zoo:cnn", method=cp.KD(temperature=2), epochs=1)
        done.student, done.accuracy.top1, done.metrics[0]
    """
    _check_names(options)
    given = {role: model for role, model in (("student", student), ("teacher", teacher)) if model is not None}
    networks = {role: _subject(role, model) for role, model in given.items() if not isinstance(model, str)}
    specs = {role: networks[role].name if role in networks else str(model) for role, model in given.items()}
    chosen = method_named(method)() if isinstance(method, str) else method
    config = Training(student=specs["student"], teacher=specs.get("teacher"), data=data, method=chosen, **options)
    if out is not None:
        return train(config, out, overwrite=overwrite, networks=networks)
    with TemporaryDirectory(prefix="cka-probe-") as folder:
        return replace(train(config, Path(folder) / "run", networks=networks), out=None)


def _subject(role: str, model: nn.Module | Subject) -> Subject:
    (subject,) = named_subjects({model.name if isinstance(model, Subject) else role: model})
    if not isinstance(subject, Subject):
        raise SpecError(f"The {role} must be a network, but {subject.name!r} is features.")
    return subject


def _check_names(options: Collection[str]) -> None:
    """Raise a SpecError where there is no such option, or it is that of a method."""
    for name in options:
        if name in COMMON:
            continue
        owners = methods_with(name)
        if owners:
            value = METHODS[owners[0]].__name__
            raise SpecError(
                f"{name} is an option of {listed(owners)}. Give it with the method: "
                f"method=cka_probe.{value}({name}=...)."
            )
        close = get_close_matches(name, COMMON, n=3)
        hint = f" Close names: {', '.join(close)}." if close else ""
        raise SpecError(f"distill has no option {name!r}.{hint}")
