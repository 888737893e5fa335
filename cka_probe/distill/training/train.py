"""distill(): the whole training, from specs to files."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from cka_probe.distill.config import Training, as_record
from cka_probe.distill.config_checks import check_training, specs_of
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.mixed_precision import check_device
from cka_probe.distill.outputs.outcome import FILES
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import draw_into
from cka_probe.distill.outputs.tensorboard import FOLDER as EVENTS_FOLDER
from cka_probe.distill.outputs.tensorboard import check_installed, event_files
from cka_probe.distill.preparation import prepare
from cka_probe.distill.training.progress import Progress
from cka_probe.distill.training.resuming import check_same, options_before, resumed_config
from cka_probe.distill.training.run.finish import Distilled, finish
from cka_probe.distill.training.run.loop import TrainingLoop
from cka_probe.distill.training.run.run import Run
from cka_probe.distill.training.run.start import begin
from cka_probe.errors import OutputError, SpecError
from cka_probe.networks.models import Subject
from cka_probe.probing.option_checks import input_paths
from cka_probe.runtime.folder.checkpoint import DISTILLATION, Which, load_checkpoint
from cka_probe.runtime.folder.run_folder import RunFolder
from cka_probe.runtime.memory import keeping_freed_memory
from cka_probe.runtime.randomness import keeping_random_state
from cka_probe.runtime.ranges import check_choice
from cka_probe.runtime.world import World, joined


def distill(  # noqa: PLR0913  # public, keyword-only
    config: Training,
    out: str | Path | RunFolder,
    *,
    resume: bool = False,
    resume_from: Which = "last",
    overwrite: bool = False,
    given: Collection[str] | None = None,
    report: bool = False,
    command: str = "",
    progress: Progress | None = None,
    networks: Mapping[str, Subject] | None = None,
) -> Distilled:
    """Train a student and write its files into ``out``.

    Args:
        config: what and how.
        out: folder for the files: new or empty, or that of the run that is resumed.
        resume: go on from the last checkpoint in ``out``, or start if there is none; a finished run is returned.
        resume_from: which checkpoint to go on from: the last, or the one before it.
        overwrite: replace the files of an earlier run.
        given: names of the options that must be those of the run that is resumed; it keeps its own for the others. All
            of them where None.
        report: draw the report too.
        command: that repeats the run, for run.yaml.
        progress: called now and then.
        networks: ``student`` or ``teacher``, where they are there already; they are copied.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change. Subclasses: `cka_probe.errors`.
    """
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    check_choice("resume_from", resume_from, get_args(Which))
    if resume_from != "last" and not resume:
        raise SpecError("--resume-from is for --resume. Add it, or leave both out.")
    if resume:
        if folder.is_moving and os.environ.get("RANK", "0") == "0":
            with folder:  # what a run was killed while moving may be its first checkpoint
                pass
        config = resumed_config(
            config, options_before(folder.path, resume_from), as_record(config) if given is None else given
        )
    loaded = networks or {}
    check_training(config, loaded)
    if config.tensorboard:
        check_installed()
    folder.check_origin(overwrite=overwrite, writes=FILES)
    with joined(config.device) as world, folder if world.writes else nullcontext(), keeping_random_state():
        if world.from_first(world.writes and resume and folder.state == "finished"):
            return _finished(config, folder, world, report)
        check_device(config, world.device)
        if world.writes:
            if overwrite:
                folder.check_inputs(input_paths(specs_of(config, loaded), *_comparison(config), config.data))
            folder.claim("distill", resume=resume, overwrite=overwrite, writes=FILES)
            if config.tensorboard:
                folder.check_folder(EVENTS_FOLDER)
        there = world.writes and resume and folder.has_checkpoint
        state = world.from_first(load_checkpoint(folder.checkpoints, DISTILLATION, resume_from) if there else None)
        if state is not None:
            check_same(config, state["config"])
        events = event_files(folder if config.tensorboard and world.writes else None)
        with keeping_freed_memory(world.device), events as add_row:
            run = Run(prepare(config, world, loaded), folder, world, command)
            run.keep_previous = resume_from == "previous"  # the run went on from that one
            begin(run, state, add_row)
            TrainingLoop(run, progress, add_row)()
            done = finish(run)
        if report and world.writes:
            draw_into(folder, read_record(folder.path))
        return done


def _comparison(config: Training) -> list[str]:
    """The finished comparison that decides, where one does."""
    method = config.method
    return [method.similarity] if isinstance(method, ByComparison) and method.similarity else []


def _finished(config: Training, folder: RunFolder, world: World, report: bool) -> Distilled:
    """What a finished run came to; its report is drawn if it is missing."""
    record = read_record(folder.path)
    if not record.finished:
        raise OutputError(f"{folder.path} holds a finished run, but not of a distillation. Name another folder.")
    check_same(config, record.options)
    if report and world.writes and not folder.holds("report.html"):
        draw_into(folder, record)
    result, images = record.result, record.counts["test"]
    taught, top5 = result.get("teacher_top1"), result.get("top5")
    teacher = None if taught is None else Accuracy(images, taught, float("nan"))
    top1 = result["top1"] if "top1" in result else result["knn"]["top1"] if result["knn"] else None
    accuracy = None if top1 is None else Accuracy(images, top1, float("nan") if top5 is None else top5)
    metrics = [dict(row) for row in record.metrics]
    return Distilled(None, accuracy, teacher, metrics, result, folder.path, world.writes)
