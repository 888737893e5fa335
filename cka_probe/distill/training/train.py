"""distill(): the whole training, from specs to files; the one loop for all methods."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor, nn

from cka_probe.distill import probe
from cka_probe.distill.config import Training, as_record
from cka_probe.distill.config_checks import check_training, specs_of
from cka_probe.distill.evaluation.accuracy import Accuracy
from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.mixed_precision import check_device
from cka_probe.distill.outputs import outcome
from cka_probe.distill.outputs.export import model_config
from cka_probe.distill.outputs.outcome import FILES
from cka_probe.distill.outputs.record import read_record
from cka_probe.distill.outputs.report import draw_into
from cka_probe.distill.outputs.tensorboard import FOLDER as EVENTS_FOLDER
from cka_probe.distill.outputs.tensorboard import check_installed, event_files
from cka_probe.distill.preparation import Prepared, prepare
from cka_probe.distill.training.best import AVERAGE, LAST, Best, better, out_of_patience, warn_if_slow
from cka_probe.distill.training.divergence import advice, broken_weights
from cka_probe.distill.training.head import with_head_alone
from cka_probe.distill.training.progress import Estimate, Live, Progress, epoch_line
from cka_probe.distill.training.resuming import check_made_of, check_same, made_of, options_before, resumed_config
from cka_probe.distill.training.scores import Scores
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.sums import LossSums
from cka_probe.errors import CkaProbeError, OutputError, SpecError, TrainingError
from cka_probe.images.broken import recorded, told
from cka_probe.networks.models import Subject
from cka_probe.probing.option_checks import input_paths
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.folder.checkpoint import (
    DISTILLATION,
    PREVIOUS,
    Which,
    load_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from cka_probe.runtime.folder.checkpoint import LAST as LAST_CHECKPOINT
from cka_probe.runtime.folder.run_folder import PRIVATE, RunFolder
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.ranges import MIN_EXAMPLES, check_choice
from cka_probe.runtime.world import World, joined

logger = logging.getLogger(__name__)

CHECK_EVERY = 20
"""Updates between two looks at whether the loss is finite, and whether a checkpoint is due."""


@dataclass(frozen=True)
class Distilled:
    """The end of a distillation.

    Attributes:
        student: the network in evaluation mode on the CPU, with the exported weights; None where the run was finished
            before.
        accuracy: of them on the test images.
        teacher: accuracy of the teacher on these; None without one.
        metrics: a row an epoch.
        result: as run.yaml holds it: the parts of the data, the best epoch, and more.
        out: the folder of the run; None where it left no files behind.
        wrote: whether this process, of several, wrote the files in it.
    """

    student: nn.Module | None
    accuracy: Accuracy
    teacher: Accuracy | None
    metrics: list[dict[str, Any]]
    result: Mapping[str, Any]
    out: Path | None
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
        with event_files(folder if config.tensorboard and world.writes else None) as add_row:
            run = _Run(prepare(config, world, loaded), folder, world, progress, add_row)
            run.keeps_previous = resume_from == "previous"
            done = run.run(state, command)
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
    if "top1" not in record.result:
        raise OutputError(f"{folder.path} holds a finished run, but not of a distillation. Name another folder.")
    check_same(config, record.options)
    if report and world.writes and not folder.holds("report.html"):
        draw_into(folder, record)
    result, images = record.result, record.counts["test"]
    taught, top5 = result.get("teacher_top1"), result["top5"]
    teacher = None if taught is None else Accuracy(images, taught, float("nan"))
    accuracy = Accuracy(images, result["top1"], float("nan") if top5 is None else top5)
    metrics = [dict(row) for row in record.metrics]
    return Distilled(None, accuracy, teacher, metrics, result, folder.path, world.writes)


class _Run:
    """One run: where it stands, what it has measured, what it writes."""

    def __init__(
        self,
        ready: Prepared,
        folder: RunFolder,
        world: World,
        progress: Progress | None,
        add_row: Callable[[outcome.Row], None],
    ) -> None:
        config = self.config = ready.setting.config
        self.folder, self.world, self._progress, self._add_row = folder, world, progress, add_row
        if config.train == "head":
            ready = with_head_alone(ready, config, world)
        self.parts, self.images, self.classes = ready.parts, ready.images, ready.setting.classes
        self.student, self.teacher, self._scores_teacher = ready.student, ready.teacher, ready.scores_teacher
        self.network = ready.student.subject.network
        self._model_config = model_config(ready.student.subject, ready.parts.classes)
        self.train = TrainingStep(ready, config, world)
        self.scores = Scores(ready, config, world)
        self.decision: probe.Decision | None = None
        self.guard: dict[str, Any] | None = None
        self.best: Best | None = None
        self._made_of: dict[str, str] = {}
        if world.writes:
            self._made_of = made_of(
                ready.parts, ready.student.subject, ready.teacher.subject if ready.teacher else None
            )
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.sums = LossSums()
        self.right = torch.zeros((), dtype=torch.float64, device=world.device)  # named right in this epoch's training
        self.seconds = self.probe_seconds = 0.0
        self.keeps_previous = False  # at the next save: the run went on from that checkpoint

    def run(self, state: dict[str, Any] | None, command: str) -> Distilled:
        """Train to the end, from a checkpoint where there is one."""
        config, counts = self.config, self.parts.counts
        self._started = self._saved = self._epochs_started = time.monotonic()
        named = {"train": "for training", "validation": "for validation", "test": "for the test"}
        logger.info("Images: %s.", ", ".join(f"{count:,} {named[part]}" for part, count in counts.items()))
        if config.ema is not None:
            warn_if_slow(config.ema, self.images.steps // config.accumulate * config.epochs)
        choice = self._choice
        if choice is not None and choice.measures_stages:
            probe.check_enough(self.parts.probed, config)
        self._command = command if state is None else state["command"]
        if state is not None:
            if self.world.writes:
                check_made_of(self._made_of, state["made_of"])
            self._restore(state)
            for row in self.history:
                self._add_row(row)
            logger.info("Going on at epoch %d, step %d of %d.", self.epoch + 1, self.step + 1, self.images.steps)
        else:
            if choice is not None and not choice.measures_stages:
                given = probe.finished_comparison(choice.similarity) if choice.similarity else None
                self._decide(given)
            self.train.equip(self.decision)
            self.guard = self.scores.guard_teacher()
            similarity = self._measure()
            if similarity is not None and self._choice_to_come:
                probe.warn_if_few(similarity, self.parts.probed, config)
            if self.world.writes:  # nothing of an earlier run is removed before this one can be resumed
                with self.folder.starting("distill") as stage:
                    outcome.stage_first(stage, self.decision.record if self.decision else None, similarity)
                    write_checkpoint(stage / PRIVATE / LAST_CHECKPOINT, self._state())
            self._saved = time.monotonic()
        self._epochs_started, self._first_epoch = time.monotonic(), self.epoch
        evaluated = len(self.scores.images) * len(self._networks()) / (config.batch_size * self.world.size)
        self._estimate = Estimate(config.epochs - self.epoch, self.images.steps, evaluated, self.world.device)
        self._saved_update = self.train.updates
        while self.epoch < config.epochs and not self._stops_early():
            if choice is not None and self._choice_to_come and self.epoch >= choice.probe_epochs:
                similarity = self._measure()
                self._write_similarity("choice", similarity)
                self._decide(similarity)
                self._write_decision()
                self.train.equip(self.decision)
            self._train_epoch()
            self._end_epoch()
        try:
            self._write_similarity("after", self._measure())
            self._measure_further()
        except CkaProbeError as error:  # the student is trained, and is worth more than this picture of it
            logger.warning("The comparison after the training is left out: %s", error)
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
            if self.train.learner.right is not None:
                self.right = self.right + self.train.learner.right
            self.step += 1
            line = self._estimate.step()
            if line:
                logger.info("%s", line)
            if update and self.train.updates % CHECK_EVERY == 0:
                self._look()
                due = time.monotonic() - self._saved >= 60 * config.checkpoint_minutes
                if due and self.step < self.images.steps:
                    self._check_weights()
                    self._save()
        self._look()
        self._check_weights()

    def _stops_early(self) -> bool:
        return not self._choice_to_come and out_of_patience(self.best, self.epoch, self.config.patience)

    @property
    def _choice(self) -> ByComparison | None:
        """The method, where it takes part at stages of the student."""
        return self.config.method if isinstance(self.config.method, ByComparison) else None

    @property
    def _choice_to_come(self) -> bool:
        return self._choice is not None and self.decision is None

    def _decide(self, similarity: Similarity | None) -> None:
        assert self.teacher is not None
        decision = None
        if self.world.writes:
            choice = self._choice
            assert choice is not None
            decision = choice.decide(self.student, self.teacher, self.config, similarity, self.classes)
            if choice.measures_stages:
                decision.record["part"] = "training" if self.parts.probed is self.parts.train else "validation"
        self.decision = self.world.from_first(decision)

    def _write_decision(self) -> None:
        if self.decision is not None and self.world.writes:
            outcome.write_stages(self.folder, self.decision.record)

    def _measure(self) -> Similarity | None:
        """The similarity of student and teacher; on the first process alone."""
        if self.teacher is None or not self.world.writes:
            return None
        images = self.parts.probed
        if len(images) < MIN_EXAMPLES:
            logger.info("Student and teacher are not compared: %s has %d images.", images.name, len(images))
            return None
        started = time.perf_counter()
        similarity = probe.measure(self.student, self.teacher, images, self.config, self.world.device)
        self.probe_seconds += time.perf_counter() - started
        return similarity

    def _measure_further(self) -> None:
        """Compare further networks of the method with student and teacher; on the first process alone."""
        images = self.parts.probed
        if self.teacher is None or not self.world.writes or len(images) < MIN_EXAMPLES:
            return
        started = time.perf_counter()
        for name, scored in self.train.learner.loss.scored.items():
            similarity = probe.measure_further(
                name, scored, self.student, self.teacher, images=images, config=self.config, device=self.world.device
            )
            self._write_similarity(name, similarity)
        self.probe_seconds += time.perf_counter() - started

    def _write_similarity(self, when: str, similarity: Similarity | None) -> None:
        if similarity is not None:
            outcome.write_similarity(self.folder, when, similarity)

    def _networks(self) -> dict[str, nn.Module]:
        """The student, and the average of its weights where there is one."""
        return {LAST: self.network} | ({AVERAGE: self.train.average} if self.train.average is not None else {})

    def _end_epoch(self) -> None:
        """Evaluate, add a row to the metrics, keep a checkpoint."""
        rate = round(self._rate(), 1)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "updates": self.train.updates,
            "lr": self.train.optimizer.param_groups[0]["lr"],
        }
        means = self.sums.means(self.world)
        row |= {"loss": sum(means.values()), **means}
        if self.train.learner.right is not None:
            seen = self.images.steps * self.config.batch_size * self.world.size
            row["train_top1"] = float(self.world.sum(self.right)) / seen
        for network in self._networks().values():
            self.world.share_buffers(network)  # those of rank 0 are exported
        further = self.train.learner.loss.scored
        for scored in further.values():
            self.world.share_buffers(scored.network)
        row |= self.scores.epoch(self._networks(), further)
        row["images_per_second"] = rate
        known = self.config.method.cautions(self.history, self.config.epochs)
        self.history.append(row)
        for caution in self.config.method.cautions(self.history, self.config.epochs):
            if caution not in known:
                logger.warning("%s", caution)
        self._add_row(row)
        self._keep_best(row)
        self.epoch, self.step, self.sums, self.right = self.epoch + 1, 0, LossSums(), torch.zeros_like(self.right)
        if self.world.writes:
            outcome.write_metrics(self.folder, self.history)
        self._save()
        spent = (time.monotonic() - self._epochs_started) / (self.epoch - self._first_epoch)
        logger.info("%s", epoch_line(row, self.config.epochs, spent * (self.config.epochs - self.epoch)))

    def _keep_best(self, row: Mapping[str, Any]) -> None:
        which, top1 = better(row)
        if top1 is None or (self.best is not None and top1 <= self.best.top1):
            return
        state = _copied(self._networks()[which]) if self.world.writes else {}
        self.best = Best(self.epoch + 1, which, top1, state)

    def _finish(self) -> Distilled:
        which, validated = better(self.history[-1])
        subject = self.student.subject
        accuracy = self.scores.test(self._networks()[which], subject)
        taught = None
        if self.teacher is not None and self._scores_teacher:
            taught = self.scores.test(self.teacher.subject.network, self.teacher.subject)
        self.train.release()
        states = {outcome.STUDENT: _copied(self._networks()[which])}
        self.network._compiled_call_impl = None
        extra: dict[str, Any] = {
            "images": self.parts.counts, "weights": which, "validation_top1": validated, "teacher_guard": self.guard,
            "epochs": self.epoch, "best": None,
        }  # fmt: skip
        if self.best is not None:
            states[outcome.BEST] = self.world.from_first(dict(self.best.state))
            self.network.load_state_dict(states[outcome.BEST])
            top1 = self.scores.test(self.network, subject).top1
            extra["best"] = {
                "file": outcome.BEST, "epoch": self.best.epoch, "weights": self.best.weights,
                "validation_top1": self.best.top1, "top1": top1,
            }  # fmt: skip
        self.network.load_state_dict(states[outcome.STUDENT])
        student = self.network.cpu().eval()
        if self.train.average is not None:
            logger.info(
                "Of the last weights and their average, %s kept%s.",
                {LAST: "the last weights are", AVERAGE: "the average is"}[which],
                ": no worse on the validation images" if validated is not None else "; there are no validation images",
            )  # fmt: skip
        times = {"seconds": round(self._seconds(), 1), "probe_seconds": round(self.probe_seconds, 1)}
        result = outcome.result(accuracy, taught, self.student.subject, self.teacher, self.world) | extra | times
        result |= recorded(self.parts.broken)
        if not self.scores.has_top5:
            result["top5"] = None
        if self.world.writes:
            if self.parts.broken:
                logger.warning("%s. They were left out or replaced: see run.yaml.", told(self.parts.broken))
            record = {"command": self._command, "options": as_record(self.config), "result": result}
            outcome.write_outcome(self.folder, record, states, self._model_config)
        return Distilled(student, accuracy, taught, self.history, result, self.folder.path, self.world.writes)

    def _look(self) -> None:
        """Stop where a part of the loss is not finite; log how far the training is."""
        names = self.sums.broken_parts(self.world)
        if names:
            self._stop(f"Every part of the loss must be finite, but {', '.join(map(repr, names))} was not", names)
        if self.train.overflows:
            self._stop("The gradients must be finite in float16, but were not at any scale of the loss", ())
        if self._progress is not None and self.world.writes:
            left = (self.config.epochs - self.epoch) * self.images.steps - self.step
            rate = self._rate()
            seconds = left * self.config.batch_size * self.world.size / rate if rate else 0.0
            top1 = better(self.history[-1])[1] if self.history else None
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
            "config": as_record(self.config),
            **self.train.state(),
            "position": [self.epoch, self.step],
            "sums": self.sums.state(),
            "history": self.history,
            "decision": [decision.stages, decision.matches, decision.record] if decision else None,
            "right": float(self.right),
            "best": self.best.plain() if self.best is not None else None,
            "images": self.parts.counts,
            "guard": self.guard,
            "seconds": self._seconds(),
            "probe_seconds": self.probe_seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Put everything where the checkpoint says. Random numbers need none: they follow from the position."""
        self.guard, self.best = state["guard"], Best.of(state["best"])
        self.decision = probe.Decision(*state["decision"]) if state["decision"] else None
        self.train.equip(self.decision)
        self.train.restore(state)
        self.epoch, self.step = state["position"]
        self.sums = LossSums.of(state["sums"], self.world.device)
        self.right = torch.full_like(self.right, state["right"])
        self.history = state["history"]
        self.seconds, self.probe_seconds = state["seconds"], state["probe_seconds"]


def _copied(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network, copied to the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
