"""The command line: a frozen dataclass a subcommand holds its options, and one library call does the work."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from cka_probe.cli.distill import Distill, Evaluate, parse_distill
from cka_probe.errors import CkaProbeError, OtherProcessError, SpecError
from cka_probe.probing.options import (
    Execution,
    FeatureOptions,
    Images,
    Measuring,
    Running,
    Selection,
    check_run,
    recorded_options,
)
from cka_probe.runtime.interrupts import interruptible, was_interrupted
from cka_probe.runtime.terminal import (
    Progress,
    finish_streams,
    log_nothing,
    log_to_stderr,
    open_streams,
    quiet_libraries,
    say,
    stdout_has_reader,
    tell,
    visible,
)

if TYPE_CHECKING:
    from cka_probe.results.similarity import Similarity
    from cka_probe.runtime.folder.run_folder import RunFolder
    from cka_probe.runtime.world import World

EXIT_FAILED_CHECK, EXIT_MENDABLE, EXIT_INTERRUPTED = 1, 2, 130

_FROM_OUTSIDE = (OSError, MemoryError, RecursionError, UnicodeError, ImportError)
"""What the system or an installation raises, and no bug."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare the layers of networks on the same images, and draw the CKA heatmaps."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="SPEC [SPEC ...]")] = ()
    """resnet18, resnet18@random, resnet18@file.safetensors, zoo:cnn, file.py:factory@file.pth, hf-hub:org/name,
    each with keyword arguments (deit_tiny_patch16_224,img_size=32@random) or a name (small=SPEC)."""

    out: Path
    """Folder for the results: new or empty."""

    overwrite: bool = False
    """Replace the files of a run that is in --out already."""

    preset: Literal["ofa-fig1"] | None = None
    """ofa-fig1: figure 1 of the OFA-KD paper, of six models (two trainings each of a CNN, a ViT and an MLP; the
    bundled ones where none are named), with the biased and the debiased estimator."""

    images: Images = Images()
    measuring: Measuring = Measuring()
    running: Running = Running()

    def run(self, command: str) -> None:
        from cka_probe.cli.presets import PRESETS
        from cka_probe.reports.run_files import files_of_comparison
        from cka_probe.runtime.folder.run_folder import RunFolder
        from cka_probe.runtime.world import joined

        models, measuring = self.models, self.measuring
        if self.preset:
            models = PRESETS[self.preset].choose(models)
            if measuring.measures == Measuring.measures:
                measuring = replace(measuring, measures=PRESETS[self.preset].measures)
        check_run(models, self.images, measuring, self.running)  # before anything is made
        measuring = replace(measuring, measures=",".join(map(str, measuring.parsed())))  # in their canonical form
        chosen = replace(self, models=models, measuring=measuring)
        folder = RunFolder(self.out)
        writes = files_of_comparison(curve=measuring.curve, influence=bool(measuring.influence))
        folder.check_origin(overwrite=self.overwrite, writes=writes)
        device = self.running.device
        with joined(device) as world, folder if world.writes else nullcontext(), resumable(folder, command):
            chosen._run(command, writes, folder, world)

    def _run(self, command: str, writes: Sequence[str], folder: RunFolder, world: World) -> None:
        from cka_probe.cli.presets import PRESETS
        from cka_probe.probing.job import Job
        from cka_probe.probing.option_checks import input_paths
        from cka_probe.reports.run_files import Run, is_finished, read_comparison
        from cka_probe.reports.writing import draw_into, write_comparison

        recorded = recorded_options(self)
        if world.from_first(world.writes and self.running.resume and is_finished(folder, recorded)):
            if world.writes:
                if not folder.holds("report.html"):  # the run was killed while it was drawn
                    draw_into(folder, read_comparison(folder.path))
                say(f"{self.out} holds this run, finished.")
            return
        if world.writes:
            if self.overwrite:
                folder.check_inputs(input_paths(self.models, self.images.data, self.images.paired))
            folder.claim("compare", resume=self.running.resume, overwrite=self.overwrite, writes=writes)
        else:
            log_nothing()
        from cka_probe.probing.compare import run_comparison

        samples: dict[str, Any] = {}
        with Progress() as progress:
            job = Job(
                images=self.images, features=self.measuring, running=self.running, world=world, progress=progress,
                preview=samples.update,
            )  # fmt: skip
            results = run_comparison(self.models, job, folder)
        if not world.writes:
            return
        record: dict[str, Any] = {"command": command, "options": recorded}
        if self.preset:
            record["panels"] = PRESETS[self.preset].panels(next(iter(results.values())).models)
        write_comparison(folder, Run(results, record, samples))
        for similarity in results.values():
            _print_summary(similarity, record.get("panels"))
        say(f"Heatmap: {self.out / 'heatmap.png'}")
        say(f"Report:  {self.out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class Extract:
    """Keep the features of networks in a folder, for later comparisons and for other tools."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="SPEC [SPEC ...]")]
    """As for compare."""

    out: Path
    """Folder for the features: new or empty."""

    overwrite: bool = False
    """Replace the files of a run that is in --out already."""

    images: Images = Images()
    features: FeatureOptions = FeatureOptions()
    running: Execution = Execution()

    def run(self, command: str) -> None:
        from cka_probe.probing.extract import FILES, run_extraction
        from cka_probe.probing.job import Job
        from cka_probe.probing.option_checks import input_paths
        from cka_probe.reports.run_files import is_finished
        from cka_probe.runtime.folder.run_folder import RunFolder
        from cka_probe.runtime.world import joined

        check_run(self.models, self.images, self.features, self.running)  # before anything is made
        options = recorded_options(self)
        folder = RunFolder(self.out)
        folder.check_origin(overwrite=self.overwrite, writes=FILES)
        device, resume = self.running.device, self.running.resume
        with joined(device) as world, folder if world.writes else nullcontext(), resumable(folder, command):
            if world.from_first(world.writes and resume and is_finished(folder, options)):
                if world.writes:
                    say(f"{self.out} holds these features, finished.")
                return
            if world.writes:
                if self.overwrite:
                    folder.check_inputs(input_paths(self.models, self.images.data, self.images.paired))
                folder.claim("extract", resume=resume, overwrite=self.overwrite, writes=FILES)
            else:
                log_nothing()
            with Progress() as progress:
                job = Job(
                    images=self.images, features=self.features, running=self.running, world=world, progress=progress
                )
                files = run_extraction(self.models, job, folder, {"command": command, "options": options})
        for file in files if world.writes else ():
            say(f"Features: {file}")


@dataclass(frozen=True)
class Layers:
    """List the layers that a selection picks, with their shapes."""

    model: Annotated[Positional[str], arg(metavar="SPEC")]
    """As for compare."""

    selection: Selection = Selection()

    image_size: int | None = None
    """Height and width, in place of the model's own."""

    def run(self, command: str) -> None:
        from cka_probe.probing.compare import list_layers

        chosen = list_layers(self.model, layers=self.selection.layers, image_size=self.image_size)
        width = max(len(visible(layer.name)) for layer in chosen)
        for layer in chosen:
            say(f"{visible(layer.name):{width}}  {' x '.join(map(str, layer.shape)):>18}  {layer.kind}")


@dataclass(frozen=True)
class Measures:
    """List the measures of similarity and their options, as --measures takes them."""

    def run(self, command: str) -> None:
        from cka_probe.measures.catalogue import listing

        say(
            "A spec is a name and its options, in any order, with colons between them: cka-rbf:0.8:biased. The first "
            "word of each choice is the default."
        )
        _list(listing())


@dataclass(frozen=True)
class Methods:
    """List the methods of distillation, as --method takes them."""

    def run(self, command: str) -> None:
        from cka_probe.distill.methods import METHODS

        _list((name, [method.summary]) for name, method in METHODS.items())


@dataclass(frozen=True)
class Report:
    """Draw a run again, from its files alone; or what changed between two finished comparisons."""

    run_directory: Annotated[Positional[Path | None], arg(metavar="DIR")] = None
    """Folder of a finished comparison, or of a distillation, finished or not: its pictures and its report are drawn
    anew."""

    before: Path | None = None
    """A finished comparison, such as one with a student before its distillation."""

    after: Path | None = None
    """One of the same layers, such as one with the student after it."""

    out: Path | None = None
    """Folder for what is drawn, new or empty: needed with --before and --after; with DIR, in place of DIR itself, such
    as while its run is still going on."""

    overwrite: bool = False
    """Replace the files that are in --out already."""

    def run(self, command: str) -> None:
        from cka_probe.probing.option_checks import check_report_options

        check_report_options(self.run_directory, self.before, self.after, self.out)
        if self.run_directory is not None:
            self._draw_again(self.run_directory)
        elif self.before is not None and self.after is not None and self.out is not None:
            self._draw_change(self.before, self.after, self.out)

    def _draw_again(self, run: Path) -> None:
        from cka_probe.distill.outputs.record import holds_distillation

        if holds_distillation(run):
            from cka_probe.distill.outputs.report import write_report as draw
        else:
            from cka_probe.reports.writing import redraw as draw
        if self.out is None:
            say(f"Report: {draw(run) / 'report.html'}")
            return
        with self._opened(self.out, writes=["report.html"]) as folder:
            draw(run, folder)
        say(f"Report: {self.out / 'report.html'}")

    def _draw_change(self, before: Path, after: Path, out: Path) -> None:
        from cka_probe.reports.writing import write_difference

        with self._opened(out, writes=["difference.csv", "difference.png"]) as folder:
            write_difference(folder, before, after)
        say(f"Change: {out / 'difference.png'}")

    @contextmanager
    def _opened(self, out: Path, *, writes: Sequence[str]) -> Iterator[RunFolder]:
        from cka_probe.runtime.folder.run_folder import RunFolder

        folder = RunFolder(out)
        folder.check_origin(overwrite=self.overwrite, writes=writes)
        with folder:
            inputs = (self.run_directory, self.before, self.after)
            folder.check_inputs(path for path in inputs if path is not None)
            kinds = ("report", "difference")
            folder.claim("report", resume=False, overwrite=self.overwrite, writes=writes, only=kinds)
            yield folder


@dataclass(frozen=True)
class Check:
    """Try on this machine what must hold of every measure: controls with known answers, and golden values."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""

    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    """Of the features that are handed to the measures."""

    def run(self, command: str) -> int:
        from cka_probe.check import run_checks

        failed, checks = 0, run_checks(device=self.device, dtype=self.dtype)
        say(f"{'check':52} {'expected':>12} {'found':>12} {'tolerance':>10}")
        for check in checks:
            verdict = "pass" if check.passed else "FAIL"
            say(f"{check.name:52} {check.expected:12.9f} {check.found:12.9f} {check.tolerance:10.1e}  {verdict}")
            failed += not check.passed
        say(f"{failed} failed" if failed else "All hold.")
        return EXIT_FAILED_CHECK if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    try:
        with interruptible():
            code = _guarded(arguments)
    finally:
        unprinted = finish_streams()
    if unprinted is not None and code == 0:
        tell(f"cka-probe: The results could not be printed: {unprinted}.")
        return EXIT_MENDABLE
    return code


def _guarded(arguments: list[str]) -> int:
    """Run a command line; what a user can mend, and what the system refuses, is said in one line."""
    try:
        return _run(arguments)
    except OtherProcessError:
        return EXIT_MENDABLE
    except KeyboardInterrupt as stop:
        tell(f"cka-probe: {str(stop) or 'interrupted; nothing was written. The same command starts again.'}")
        return EXIT_INTERRUPTED
    except Exception as error:  # what the user cannot mend is raised again
        if was_interrupted():  # a library made an error of its own of it
            tell("cka-probe: interrupted. Go on with --resume where something was saved, or start again.")
            return EXIT_INTERRUPTED
        if isinstance(error, CkaProbeError):
            tell(f"cka-probe: {error}")
            return EXIT_MENDABLE
        if isinstance(error, BrokenPipeError) and not stdout_has_reader():
            return 0
        if isinstance(error, _FROM_OUTSIDE):
            tell(f"cka-probe: {type(error).__name__}: {error}".removesuffix(": "))
            return EXIT_MENDABLE
        if hasattr(error, "add_note"):  # from Python 3.11 on, below the traceback
            error.add_note("This is a bug in cka-probe. Please report it with the command and the lines above.")
        raise


def _run(arguments: list[str]) -> int:
    if "--version" in arguments[:1]:
        return _print_version(arguments[1:])
    _check_report_folders(arguments)
    chosen: Any
    if arguments[:1] == ["distill"]:  # its defaults depend on --recipe and --config
        chosen = parse_distill(arguments[1:])
    else:
        chosen = tyro.extras.subcommand_cli_from_dict(
            {
                "check": Check,
                "compare": Compare,
                "distill": Distill,
                "evaluate": Evaluate,
                "extract": Extract,
                "layers": Layers,
                "measures": Measures,
                "methods": Methods,
                "report": Report,
            },
            prog="cka-probe",
            description="Where two vision networks agree, layer by layer, and distillation that acts on it.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    with quiet_libraries():
        log_to_stderr()
        if not isinstance(chosen, Report):  # which needs neither
            _check_installation()
        return chosen.run(shlex.join(["cka-probe", *arguments])) or 0


def _print_version(others: Sequence[str]) -> int:
    from importlib.metadata import version

    if others:
        raise SpecError(f"--version stands alone, but came with {' '.join(others)}.")
    say(f"cka-probe {version('cka-probe')}")
    return 0


def _check_report_folders(arguments: Sequence[str]) -> None:
    """Raise a SpecError where ``report`` is given two folders without a flag before them."""
    folders, before = [], ""
    for argument in arguments[1:] if arguments[:1] == ["report"] else ():
        if not argument.startswith("-") and before not in ("--before", "--after", "--out"):
            folders.append(argument)
        before = argument
    if len(folders) > 1:
        raise SpecError(
            f"report takes one folder, but got {len(folders)} ({', '.join(folders)}). To see what changed: cka-probe "
            f"report --before {folders[0]} --after {folders[1]} --out DIR"
        )


def _check_installation() -> None:
    """Raise a CkaProbeError where PyTorch or timm cannot be imported, whatever they raise."""
    for name in ("torch", "torchvision", "timm"):
        try:
            import_module(name)
        except Exception as error:  # a broken installation fails in many ways
            if was_interrupted():
                raise
            raise CkaProbeError(
                f"The package {name} cannot be imported: {type(error).__name__}: {error}. Install it again: "
                f"pip install --force-reinstall {name}"
            ) from error


@contextmanager
def resumable(folder: RunFolder, command: str) -> Iterator[None]:
    """Within the block, an interrupt says how the run in the folder goes on, if it can."""
    try:
        yield
    except BaseException as stop:
        # A library may have turned the interrupt into an error of its own.
        if not (isinstance(stop, KeyboardInterrupt) or was_interrupted()):
            raise
        if folder.has_checkpoint:
            again = command if "--resume" in command.split() else f"{command} --resume"
            raise KeyboardInterrupt(f"interrupted. Go on with: {again}") from stop
        if folder.holds("similarity.npz") and not folder.holds("report.html"):
            raise KeyboardInterrupt(
                f"interrupted while the report was drawn. The results are in {folder.path}. Draw it with: cka-probe "
                f"report {folder.path}"
            ) from stop
        raise


def _list(entries: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Print names and, indented below each, what it is."""
    for name, texts in entries:
        say("")
        say(name)
        for text in texts:
            for line in textwrap.wrap(text, 96):
                say(f"    {line}")


def _print_summary(similarity: Similarity, panels: dict[str, Any] | None) -> None:
    """For each pair of models, where they agree most."""
    from cka_probe.measures.catalogue import about
    from cka_probe.results.findings import compare_pair, model_pairs

    for first, second in panels["pairs"] if panels else model_pairs(similarity):
        found = compare_pair(similarity, first, second)
        if found is None or first == second:
            continue
        cell = found.largest
        uncertainty = f" ± {cell.std_error:.3f}" if cell.std_error == cell.std_error else ""
        corrected = cell.p_value == cell.p_value and about(similarity.measure).kind == "similarity"
        tested = f" (p = {cell.p_value:.2g}, corrected for the choice)" if corrected else ""
        closest = "agree most" if about(similarity.measure).kind == "similarity" else "are closest"
        say(
            f"{first} and {second} {closest} at {cell.first.name} and {cell.second.name}: {similarity.measure} "
            f"{cell.value:.3f}{uncertainty}{tested}; at matched depth {found.mean:.3f} on average"
        )


if __name__ == "__main__":
    sys.exit(main())
