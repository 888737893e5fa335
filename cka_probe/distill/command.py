"""The subcommands distill and evaluate. Importing this loads nothing heavy, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Fixed, Positional, Suppress, arg

from cka_probe.distill.config import (
    GROUPS,
    Augmentation,
    Evaluation,
    MethodOptions,
    Networks,
    Optimization,
    StageChoice,
    Training,
    TrainingData,
    TrainingRun,
    recipe,
    recorded,
    with_options,
)
from cka_probe.distill.progress import LiveLine
from cka_probe.errors import SpecError
from cka_probe.interrupts import was_interrupted
from cka_probe.terminal import say

if TYPE_CHECKING:
    from cka_probe.runtime.run_folder import RunFolder

_NO_STUDENT = ""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a student network from a teacher, or from labels alone, to the end."""

    out: Path
    """Folder for the results: new or empty, or that of the run to resume."""

    recipe: str | None = None
    """Values to start from: cifar-cnn, cifar-token, imagenet-cnn, imagenet-token, digits. Options overrule it. Where
    its warm-up is longer than --epochs, it is shortened to the same share of the run."""

    config: Path | None = None
    """A run.yaml to repeat. Options overrule it, as those of a recipe."""

    resume: bool = False
    """Go on from a checkpoint in --out; the other options may be left out then."""

    resume_from: Literal["last", "previous"] = "last"
    """Which checkpoint --resume goes on from. previous is the one before the last: for a run whose last checkpoint
    holds weights from which the loss is not finite."""

    overwrite: bool = False
    """Replace the files of a run that is in --out already."""

    networks: Networks = Networks(student=_NO_STUDENT)
    images: TrainingData = TrainingData()
    method: MethodOptions = MethodOptions()
    stages: StageChoice = StageChoice()
    optimization: Optimization = Optimization()
    augmentation: Augmentation = Augmentation()
    running: TrainingRun = TrainingRun()

    given: Annotated[frozenset[str], Suppress, Fixed] = frozenset()
    # Names of the options that were given, be it with the value of the default: filled by `parse_distill`.

    @property
    def training(self) -> Training:
        """The options of all groups."""
        groups = (getattr(self, name) for name in GROUPS)
        return Training(**{name: value for group in groups for name, value in vars(group).items()})

    def run(self, command: str) -> None:
        """Train, and say what came out."""
        from cka_probe.distill.train import distill
        from cka_probe.runtime.run_folder import RunFolder

        config = self.training
        if config.student == _NO_STUDENT and not self.resume:
            raise SpecError("A distillation needs a student: --student SPEC.")
        folder = RunFolder(self.out)
        if self.overwrite and self.config is not None and folder.path in self.config.expanduser().resolve().parents:
            raise SpecError(f"--config {self.config} lies in --out, and would be replaced. Name another folder.")
        try:
            done = distill(
                config, folder, resume=self.resume, resume_from=self.resume_from, overwrite=self.overwrite,
                given=self.given, report=True, command=command, progress=LiveLine(),
            )  # fmt: skip
        except BaseException as stop:
            # A library may have turned the interrupt into an error of its own.
            if isinstance(stop, KeyboardInterrupt) or was_interrupted():
                raise KeyboardInterrupt(f"interrupted. {self._goes_on(folder)}") from stop
            raise
        if not done.wrote:  # another process of a torchrun does
            return
        low, high = done.accuracy.interval()
        say(f"Top-1 {done.accuracy.top1:.2%} (95% interval {low:.2%} to {high:.2%}) of {done.accuracy.images} images")
        say(f"Student: {self.out / 'student.safetensors'}")
        say(f"Report:  {self.out / 'report.html'}")

    def _goes_on(self, folder: RunFolder) -> str:
        if folder.state == "finished":
            return f"The run is finished; its report is drawn by: cka-probe report {self.out}"
        if folder.has_checkpoint:
            return f"Go on with: cka-probe distill --resume --out {self.out}"
        return "The same command starts again."


@dataclass(frozen=True)
class Evaluate:
    """Measure how many held-out images a network names right."""

    model: Annotated[Positional[str], arg(metavar="SPEC")]
    """As for compare."""

    evaluation: Evaluation = Evaluation()

    def run(self, command: str) -> None:
        """Evaluate, and print top-1, top-5 and the interval."""
        from cka_probe.distill.evaluation import evaluate_spec

        accuracy = evaluate_spec(self.model, **vars(self.evaluation))
        low, high = accuracy.interval()
        say(f"Top-1 {accuracy.top1:.2%} (95% interval {low:.2%} to {high:.2%})")
        say(f"Top-5 {accuracy.top5:.2%}")
        say(f"Images {accuracy.images}")


def parse_distill(arguments: Sequence[str]) -> Distill:
    """The options of a command line, over those of ``--config``, over those of ``--recipe``, over the defaults."""
    presets: dict[str, Any] = {}
    for flag, read in (("--recipe", recipe), ("--config", lambda path: recorded(Path(path)))):
        value = _value_of(flag, arguments)
        if value is not None:
            presets |= read(value)
    config = with_options(Training(student=_NO_STUDENT), presets)
    groups: dict[str, Any] = {
        name: group(**{field.name: getattr(config, field.name) for field in fields(group)})
        for name, group in GROUPS.items()
    }
    parsed = tyro.cli(
        Distill, args=list(arguments), prog="cka-probe distill", description=Distill.__doc__,
        default=Distill(out=tyro.MISSING, **groups), config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    given = _flags_in(arguments)
    if "warmup_epochs" not in given:
        parsed = replace(parsed, optimization=_with_shorter_warmup(parsed.optimization, config.epochs))
    return replace(parsed, given=frozenset(presets) | given)


def _with_shorter_warmup(options: Optimization, preset: int) -> Optimization:
    """The options with a warm-up that fits into the run: of the same share of it as of the epochs that were preset."""
    if options.warmup_epochs <= options.epochs:
        return options
    return replace(options, warmup_epochs=options.warmup_epochs * options.epochs / preset)


def _flags_in(arguments: Sequence[str]) -> frozenset[str]:
    """The options of a distillation whose flags stand in a command line, whatever their values."""
    flags = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    names = {field.name for field in fields(Training)}
    return frozenset(name for name in names if name in flags or f"no_{name}" in flags)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
