"""``cka-probe distill``. Importing this loads nothing heavy, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Fixed, Suppress, arg

from cka_probe.cli.help_texts import asks_for_help, join_lines
from cka_probe.distill.config import (
    COMMON,
    GROUPS,
    Augmentation,
    DividedData,
    Networks,
    Optimization,
    Training,
    TrainingRun,
    method_options,
    methods_with,
)
from cka_probe.distill.methods import METHODS, Method, method_named
from cka_probe.distill.recipes import recipe, recorded, with_options
from cka_probe.distill.training.progress import LiveLine
from cka_probe.errors import SpecError
from cka_probe.runtime.interrupts import was_interrupted
from cka_probe.runtime.ranges import flag, listed
from cka_probe.runtime.terminal import print_result

if TYPE_CHECKING:
    from cka_probe.runtime.folder.run_folder import RunFolder

_NO_STUDENT = ""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a student network from a teacher, or from labels alone."""

    out: Path
    """Folder for the results: new or empty, or the run to resume."""

    recipe: str | None = None
    """Preset values: cifar-cnn, cifar-token, imagenet-cnn, imagenet-token, digits or head. Options override them. A
    warm-up longer than --epochs is shortened to the same fraction of the run."""

    config: Path | None = None
    """A run.yaml to repeat. Options override its values."""

    resume: bool = False
    """Resume from the checkpoint in --out. The other options may then be omitted."""

    resume_from: Literal["last", "previous"] = "last"
    """The checkpoint that --resume starts from: the last, or the previous one, if training diverges from the last."""

    overwrite: bool = False
    """Replace the files of an earlier run in --out."""

    method_name: Annotated[str, arg(name="method")] = Training.method.name
    """How the student is taught: none (from scratch), kd, ofa, fbt, fitnet, cc, rkd, crd, rsd, dkd, dist, words, or
    obow (without labels). Each has options of its own: --method NAME --help shows them. The command cka-probe methods
    says what each does."""

    networks: Networks = Networks(student=_NO_STUDENT)
    images: DividedData = DividedData()
    method: Method = Training.method
    optimization: Optimization = Optimization()
    augmentation: Augmentation = Augmentation()
    running: TrainingRun = TrainingRun()

    given: Annotated[frozenset[str], Suppress, Fixed] = frozenset()
    # Names of the options that were given, even if with the value of the default: filled by `parse_distill`.

    @property
    def training(self) -> Training:
        """The options of all groups."""
        groups = (getattr(self, name) for name in GROUPS)
        common = {name: value for group in groups for name, value in vars(group).items()}
        return Training(**common, method=self.method)

    def run(self, command: str) -> None:
        """Train, and say what came out."""
        from cka_probe.distill.training.train import distill
        from cka_probe.runtime.folder.run_folder import RunFolder

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
        if done.accuracy is not None:
            low, high = done.accuracy.interval()
            images = f"{done.accuracy.images:,} test images"
            what = "Top-1" if "top1" in done.result else "Top-1 of nearest neighbours (kNN)"
            print_result(f"{what} {done.accuracy.top1:.2%} (95% interval {low:.2%} to {high:.2%}) of {images}")
        if done.accuracy is not None and done.result.get("top5") is not None:
            print_result(f"Top-5 {done.accuracy.top5:.2%}")
        if done.teacher is not None:
            print_result(f"Teacher: top-1 {done.teacher.top1:.2%} of the same images")
        best = done.result.get("best")
        if best:
            print_result(
                f"Best epoch: {best['epoch']}, by the validation images ({best['validation_top1']:.2%}); "
                f"{best['top1']:.2%} of the test images: {self.out / best['file']}"
            )
        print_result(f"Student: {self.out / 'student.safetensors'}")
        print_result(f"Report:  {self.out / 'report.html'}")

    def _goes_on(self, folder: RunFolder) -> str:
        if folder.state == "finished":
            return f"The run is finished; its report is drawn by: cka-probe report {self.out}"
        if folder.has_checkpoint:
            return f"Go on with: cka-probe distill --resume --out {self.out}"
        return "The same command starts again."


def parse_distill(arguments: Sequence[str]) -> Distill:
    """The options of a command line, over those of ``--config``, over those of ``--recipe``, over the defaults.

    Raises:
        SpecError: a flag is of another method than the chosen one.
    """
    presets: dict[str, Any] = {}
    for preset, read in (("--recipe", recipe), ("--config", lambda path: recorded(Path(path)))):
        value = _value_of(preset, arguments)
        if value is not None:
            presets |= read(value)
    method = method_named(
        _value_of("--method", arguments) or _method_before(arguments) or presets.get("method", Distill.method_name)
    )
    given = _flags_in(arguments)
    _check_owners(given, method)
    config = with_options(Training(student=_NO_STUDENT), {**presets, "method": method.name})
    groups: dict[str, Any] = {
        name: group(**{field.name: getattr(config, field.name) for field in fields(group)})
        for name, group in GROUPS.items()
    }
    if asks_for_help(arguments):
        join_lines(Distill)
        join_lines(method)
    parsed = tyro.cli(
        Distill, args=list(arguments), prog="cka-probe distill", description=Distill.__doc__,
        default=Distill(out=tyro.MISSING, method_name=method.name, method=config.method, **groups),
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    if "warmup_epochs" not in given:
        parsed = replace(parsed, optimization=_with_shorter_warmup(parsed.optimization, config.epochs))
    return replace(parsed, given=frozenset(presets) | given)


def _method_before(arguments: Sequence[str]) -> str | None:
    """The method of the run that is resumed; None where none is."""
    out = _value_of("--out", arguments)
    if out is None or "--resume" not in arguments or {"-h", "--help"} & set(arguments):
        return None
    from cka_probe.distill.training.resuming import options_before
    from cka_probe.runtime.folder.run_folder import RunFolder

    which: Literal["last", "previous"] = "previous" if _value_of("--resume-from", arguments) == "previous" else "last"
    before = options_before(RunFolder(out).path, which)
    return None if before is None else str(before["method"])


def _check_owners(given: Collection[str], method: type[Method]) -> None:
    """Raise a SpecError where a flag is an option of other methods alone."""
    for name in sorted(given):
        owners = methods_with(name)
        if owners and method.name not in owners:
            raise SpecError(
                f"{flag(name)} is an option of {listed(owners)}, but the method is {method.name}. Choose the "
                f"method by --method {owners[0]}, or leave the option out."
            )


def _with_shorter_warmup(options: Optimization, preset: int) -> Optimization:
    """The options with a warm-up that fits into the run: of the same share of it as of the epochs that were preset."""
    if options.warmup_epochs <= options.epochs:
        return options
    return replace(options, warmup_epochs=options.warmup_epochs * options.epochs / preset)


def _flags_in(arguments: Sequence[str]) -> frozenset[str]:
    """The options of a distillation whose flags stand in a command line, whatever their values."""
    flags = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    names = COMMON.union(*(method_options(method) for method in METHODS.values()))
    return frozenset(name for name in names if name in flags or f"no_{name}" in flags)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value that a command line gives an option, the last of several; None where it gives none."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found
