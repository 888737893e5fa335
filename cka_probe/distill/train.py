"""distill(): the whole training, from specs to files; the one loop for all methods."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from torch import nn

from cka_probe.checkpoint import (
    DISTILLATION,
    LAST,
    PREVIOUS,
    Which,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from cka_probe.distill import outcome, probe
from cka_probe.distill.config import Evaluation, Training
from cka_probe.distill.divergence import advice, broken_weights
from cka_probe.distill.evaluation import Accuracy, evaluate
from cka_probe.distill.methods import METHODS
from cka_probe.distill.outcome import FILES
from cka_probe.distill.preparation import prepare
from cka_probe.distill.progress import Live, Progress
from cka_probe.distill.record import read_record
from cka_probe.distill.report import draw_into
from cka_probe.distill.resuming import check_made_of, check_same, made_of, resumed_config
from cka_probe.distill.step import TrainingStep
from cka_probe.distill.subjects import check_teacher
from cka_probe.distill.sums import LossSums
from cka_probe.distill.tensorboard import FOLDER as EVENTS_FOLDER
from cka_probe.distill.tensorboard import check_installed, event_files
from cka_probe.errors import OutputError, SpecError, TrainingError
from cka_probe.models import Subject
from cka_probe.option_checks import input_paths
from cka_probe.randomness import keeping_random_state, seed_everything
from cka_probe.ranges import check_choice
from cka_probe.runtime.run_folder import PRIVATE, RECORD, RunFolder, kind_of
from cka_probe.similarity import Similarity
from cka_probe.world import World, joined

logger = logging.getLogger(__name__)

CHECK_EVERY = 20
"""Updates between two looks at whether the loss is finite, and whether a checkpoint is due."""


@dataclass(frozen=True)
class Distilled:
    """The end of a distillation.

    Attributes:
        student: the network in evaluation mode on the CPU, with the exported weights; None where the run was finished
            before.
        accuracy: of them on the held-out images.
        teacher: accuracy of the teacher; None without one.
        metrics: a row an epoch.
        out: the folder of the run.
        wrote: whether this process, of several, wrote the files in it.
    """

    student: nn.Module | None
    accuracy: Accuracy
    teacher: Accuracy | None
    metrics: list[dict[str, Any]]
    out: Path
    wrote: bool = True


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

    Raises:
        CkaProbeError: of one kind or another (see `cka_probe.errors`), where the caller can mend it.
    """
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    check_choice("resume_from", resume_from, get_args(Which))
    if resume_from != "last" and not resume:
        raise SpecError("--resume-from is for --resume. Add it, or leave both out.")
    if resume:
        if folder.is_moving and os.environ.get("RANK", "0") == "0":
            with folder:  # what a run was killed while moving may be its first checkpoint
                pass
        config = resumed_config(config, _options_before(folder.path, resume_from), _OPTIONS if given is None else given)
    config.check()
    if config.tensorboard:
        check_installed()
    folder.check_origin(overwrite=overwrite, writes=FILES)
    with joined(config.device) as world, folder if world.writes else nullcontext(), keeping_random_state():
        if world.from_first(world.writes and resume and folder.state == "finished"):
            return _finished(config, folder, world, report)
        if world.writes:
            if overwrite:
                folder.check_inputs(input_paths([config.student, config.teacher], config.similarity, config.data))
            folder.claim("distill", resume=resume, overwrite=overwrite, writes=FILES)
            if config.tensorboard:
                folder.check_folder(EVENTS_FOLDER)
        there = world.writes and resume and folder.has_checkpoint
        state = world.from_first(load_checkpoint(folder.checkpoints, DISTILLATION, resume_from) if there else None)
        if state is not None:
            check_same(config, state["config"])
        with event_files(folder if config.tensorboard and world.writes else None) as add_row:
            run = _Run(config, folder, world, progress, add_row)
            run.keeps_previous = resume_from == "previous"
            done = run.run(state, command)
        if report and world.writes:
            draw_into(folder, read_record(folder.path))
        return done


_OPTIONS = frozenset(field.name for field in fields(Training))


def _options_before(path: Path, which: Which) -> Mapping[str, Any] | None:
    """The options of the distillation in a folder, finished or not; None where there is none."""
    if kind_of(path) != "distill":
        return None
    state = load_checkpoint(path / PRIVATE, DISTILLATION, which)
    if state is not None:
        options: Mapping[str, Any] = state["config"]
        return options
    return read_record(path).options if (path / RECORD).is_file() else None


def _finished(config: Training, folder: RunFolder, world: World, report: bool) -> Distilled:
    """What a finished run came to; its report is drawn if it is missing."""
    record = read_record(folder.path)
    if "top1" not in record.result:
        raise OutputError(f"{folder.path} holds a finished run, but not of a distillation. Name another folder.")
    check_same(config, record.options)
    if report and world.writes and not folder.holds("report.html"):
        draw_into(folder, record)
    result = record.result
    top1, top5, images = result["top1"], result["top5"], result["held_out"]
    taught = result.get("teacher_top1")
    teacher = None if taught is None else Accuracy(images, taught, float("nan"))
    metrics = [dict(row) for row in record.metrics]
    return Distilled(None, Accuracy(images, top1, top5), teacher, metrics, folder.path, world.writes)


class _Run:
    """One run: where it stands, what it has measured, what it writes."""

    def __init__(
        self,
        config: Training,
        folder: RunFolder,
        world: World,
        progress: Progress | None,
        add_row: Callable[[outcome.Row], None],
    ) -> None:
        self.config, self.folder, self.world, self._progress, self._add_row = config, folder, world, progress, add_row
        ready = prepare(config, world)
        self.parts, self.images, self.classes = ready.parts, ready.images, ready.setting.classes
        self.student, self.teacher = ready.student, ready.teacher
        self.network = ready.student.subject.network
        self.train = TrainingStep(ready, config, world)
        self.decision: probe.Decision | None = None
        self.teacher_accuracy: Accuracy | None = None
        self._made_of: dict[str, str] = {}
        if world.writes:
            self._made_of = made_of(
                ready.parts, ready.student.subject, ready.teacher.subject if ready.teacher else None
            )
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.sums = LossSums()
        self.seconds = self.probe_seconds = 0.0
        self.keeps_previous = False  # at the next save: the run went on from that checkpoint

    def run(self, state: dict[str, Any] | None, command: str) -> Distilled:
        """Train to the end, from a checkpoint where there is one."""
        config = self.config
        self._started = self._saved = time.monotonic()
        self._command = command if state is None else state["command"]
        if state is not None:
            if self.world.writes:
                check_made_of(self._made_of, state["made_of"])
            self._restore(state)
            for row in self.history:
                self._add_row(row)
            logger.info("Going on at epoch %d, step %d of %d.", self.epoch + 1, self.step + 1, self.images.steps)
        else:
            if METHODS[config.method].chooses and (config.stages != "auto" or config.similarity):
                given = probe.finished_comparison(config.similarity) if config.similarity else None
                self._decide(given)
            self.train.equip(self.decision)
            self._guard_teacher()
            similarity = self._measure()
            if self.world.writes:  # nothing of an earlier run is removed before this one can be resumed
                with self.folder.starting("distill") as stage:
                    outcome.stage_first(stage, self.decision.record if self.decision else None, similarity)
                    write_checkpoint(stage / PRIVATE / LAST, self._state())
            self._saved = time.monotonic()
        self._saved_update = self.train.updates
        while self.epoch < config.epochs:
            if self._choice_is_due():
                similarity = self._measure()
                self._write_similarity("choice", similarity)
                self._decide(similarity)
                self._write_decision()
                self.train.equip(self.decision)
            self._train_epoch()
            self._end_epoch()
        self._write_similarity("after", self._measure())
        return self._finish()

    def _train_epoch(self) -> None:
        """The steps of an epoch that are still to be done."""
        config = self.config
        self._epoch_started, self._first_step = time.perf_counter(), self.step
        self.train.learner.train()
        for batch in self.images.epoch(self.epoch, first=self.step, pin=self.world.device.type == "cuda"):
            seed_everything(config.seed, self.world.rank, self.epoch, self.step)
            update = (self.step + 1) % config.accumulate == 0
            self.sums.add(self.train(batch, update=update))
            self.step += 1
            if update and self.train.updates % CHECK_EVERY == 0:
                self._look()
                due = time.monotonic() - self._saved >= 60 * config.checkpoint_minutes
                if due and self.step < self.images.steps:
                    self._check_weights()
                    self._save()
        self._look()
        self._check_weights()

    def _choice_is_due(self) -> bool:
        undecided = METHODS[self.config.method].chooses and self.decision is None
        return undecided and self.epoch >= self.config.probe_epochs

    def _decide(self, similarity: Similarity | None) -> None:
        assert self.teacher is not None
        decision = None
        if self.world.writes:
            decision = probe.decide(self.student, self.teacher, self.config, similarity, self.classes)
        self.decision = self.world.from_first(decision)

    def _write_decision(self) -> None:
        if self.decision is not None and self.world.writes:
            outcome.write_stages(self.folder, self.decision.record)

    def _measure(self) -> Similarity | None:
        """The similarity of student and teacher; on the first process alone."""
        if self.teacher is None or not self.world.writes:
            return None
        started = time.perf_counter()
        similarity = probe.measure(self.student, self.teacher, self.parts.held_out, self.config, self.world.device)
        self.probe_seconds += time.perf_counter() - started
        return similarity

    def _write_similarity(self, when: str, similarity: Similarity | None) -> None:
        if similarity is not None:
            outcome.write_similarity(self.folder, when, similarity)

    def _guard_teacher(self) -> None:
        if self.teacher is None:
            return
        subject = self.teacher.subject
        self.teacher_accuracy = self._evaluated(subject.network, subject)
        logger.info("Teacher %s: %.2f%% of the held-out images.", subject.name, 100 * self.teacher_accuracy.top1)
        check_teacher(subject.name, self.teacher_accuracy, self.classes)

    def _evaluated(self, network: nn.Module, subject: Subject) -> Accuracy:
        config = self.config
        options = Evaluation(batch_size=config.batch_size, workers=config.workers, bf16=config.bf16)
        return evaluate(subject, self.parts.held_out, self.world, options, network)

    def _end_epoch(self) -> None:
        """Evaluate, add a row to the metrics, keep a checkpoint."""
        rate = round(self._rate(), 1)
        for network in (self.network, self.train.average):
            if network is not None:
                self.world.share_buffers(network)  # those of rank 0 are exported
        accuracy = self._evaluated(self.network, self.student.subject)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "updates": self.train.updates,
            "lr": self.train.optimizer.param_groups[0]["lr"],
        }
        means = self.sums.means(self.world)
        row |= {"loss": sum(means.values()), **means, "top1": accuracy.top1, "top5": accuracy.top5}
        if self.train.average is not None:
            row["top1_ema"] = self._evaluated(self.train.average, self.student.subject).top1
        row["images_per_second"] = rate
        self.history.append(row)
        self._add_row(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, LossSums()
        if self.world.writes:
            outcome.write_metrics(self.folder, self.history)
        self._save()

    def _finish(self) -> Distilled:
        network = self.network if self.train.average is None else self.train.average
        accuracy = self._evaluated(network, self.student.subject)
        self.train.release()
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.network._compiled_call_impl = None
        self.network.load_state_dict(state)
        student = self.network.cpu().eval()
        if self.world.writes:
            result = outcome.result(accuracy, self.teacher_accuracy, self.student.subject, self.teacher, self.world)
            times = {"seconds": round(self._seconds(), 1), "probe_seconds": round(self.probe_seconds, 1)}
            record = {"command": self._command, "options": asdict(self.config), "result": result | times}
            outcome.write_outcome(self.folder, record, self.student.subject, state, self.parts.classes)
        return Distilled(student, accuracy, self.teacher_accuracy, self.history, self.folder.path, self.world.writes)

    def _look(self) -> None:
        """Stop where a part of the loss is not finite; tell where the training is."""
        names = self.sums.broken_parts(self.world)
        if names:
            self._stop(f"Every part of the loss must be finite, but {', '.join(map(repr, names))} was not", names)
        if self._progress is not None and self.world.writes:
            left = (self.config.epochs - self.epoch) * self.images.steps - self.step
            rate = self._rate()
            seconds = left * self.config.batch_size * self.world.size / rate if rate else 0.0
            top1 = self.history[-1]["top1"] if self.history else None
            self._progress(Live(self.epoch + 1, self.config.epochs, rate, seconds, self.sums.own_means(), top1))

    def _check_weights(self) -> None:
        """Stop where the weights are not finite after the last update, whose loss is not known yet."""
        names = broken_weights(self.train.learner, self.world)
        if names:
            named = f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            self._stop(f"The weights must be finite before a checkpoint is kept, but those of {named} were not", ())

    def _stop(self, what: str, broken: Sequence[str]) -> NoReturn:
        """Raise a TrainingError that names the checkpoints which there are, and the likely cause."""
        there = f"The last checkpoint is of update {self._saved_update}."
        if (self.folder.checkpoints / PREVIOUS).exists():
            there += " If its weights are broken, --resume --resume-from previous goes on from the one before it."
        raise TrainingError(
            f"{what}, in epoch {self.epoch + 1} by update {self.train.updates}. {there} "
            f"{advice(self.config, broken, self.sums.last_finite())}"
        )

    def _rate(self) -> float:
        images = (self.step - self._first_step) * self.config.batch_size * self.world.size
        return images / max(time.perf_counter() - self._epoch_started, 1e-9)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _save(self) -> None:
        if self.world.writes:
            save_checkpoint(self.folder, "distill", self._state(), keep_previous=self.keeps_previous)
        self.keeps_previous = False
        self._saved, self._saved_update = time.monotonic(), self.train.updates

    def _state(self) -> dict[str, Any]:
        """What `_restore` needs."""
        decision = self.decision
        return {
            "command": self._command,
            "made_of": self._made_of,
            "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.config).items()},
            **self.train.state(),
            "position": [self.epoch, self.step],
            "sums": self.sums.state(),
            "history": self.history,
            "decision": [decision.stages, decision.matches, decision.record] if decision else None,
            "teacher": list(asdict(self.teacher_accuracy).values()) if self.teacher_accuracy else None,
            "seconds": self._seconds(),
            "probe_seconds": self.probe_seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Put everything where the checkpoint says. Random numbers need none: they follow from the position."""
        self.teacher_accuracy = Accuracy(*state["teacher"]) if state["teacher"] else None
        self.decision = probe.Decision(*state["decision"]) if state["decision"] else None
        self.train.equip(self.decision)
        self.train.restore(state)
        self.epoch, self.step = state["position"]
        self.sums = LossSums.of(state["sums"], self.world.device)
        self.history = state["history"]
        self.seconds, self.probe_seconds = state["seconds"], state["probe_seconds"]
