"""distill(): the whole training, from specs to files; the one loop for all methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.distill import outcome, probe
from cka_probe.distill.checkpoint import load_checkpoint, save_checkpoint
from cka_probe.distill.config import DistillConfig, check
from cka_probe.distill.evaluation import Accuracy, evaluate
from cka_probe.distill.folder import check_same, claim, release
from cka_probe.distill.learner import Learner, extend_optimizer, make_optimizer, make_schedule
from cka_probe.distill.methods import METHODS
from cka_probe.distill.pipeline import Batch, keeping_random_state, seed_everything
from cka_probe.distill.preparation import prepare
from cka_probe.distill.subjects import check_teacher, parameters
from cka_probe.distill.sums import LossSums
from cka_probe.distill.taps import Taps
from cka_probe.distill.world import World, joined
from cka_probe.errors import TrainingError
from cka_probe.memory import explaining_out_of_memory
from cka_probe.provenance import versions
from cka_probe.similarity import Similarity

logger = logging.getLogger(__name__)

CHECK_EVERY = 20
"""Updates between two looks at whether the loss is finite, and whether a checkpoint is due."""


@dataclass(frozen=True)
class Live:
    """Where a training is: handed to ``progress`` at each look.

    Attributes:
        epoch: under way, from 1.
        epochs: in all.
        images_per_second: since the training was started or resumed.
        seconds_left: at that rate, evaluations left out.
        parts: of the loss, their means in this epoch.
        top1: at the end of the last epoch; None before.
    """

    epoch: int
    epochs: int
    images_per_second: float
    seconds_left: float
    parts: dict[str, float]
    top1: float | None


Progress = Callable[[Live], None]


@dataclass(frozen=True)
class Distilled:
    """The end of a distillation.

    Attributes:
        student: the network in evaluation mode on the CPU, with the exported weights.
        accuracy: of them on the held-out images.
        teacher: accuracy of the teacher; None without one.
        metrics: a row an epoch.
        out: the folder of the run.
    """

    student: nn.Module
    accuracy: Accuracy
    teacher: Accuracy | None
    metrics: list[dict[str, Any]]
    out: Path


def distill(
    config: DistillConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Distilled:
    """Train a student to the end and write its files into ``out``.

    Args:
        config: what and how.
        out: folder for the files: new or empty, or that of the run that is resumed.
        resume: go on from the last checkpoint in ``out``; where there is none, start.
        overwrite: replace the files of an earlier run.
        command: that repeats the run, for run.yaml.
        progress: called now and then.

    Raises:
        CkaProbeError: of one kind or another (see `cka_probe.errors`), where the caller can mend it.
    """
    check(config)
    with joined(config.device) as world, keeping_random_state():
        if world.writes:
            claim(out, resume=resume, overwrite=overwrite)
        state = world.from_first(load_checkpoint(out) if resume and world.writes else None)
        if state is not None:
            check_same(config, state["config"])
        try:
            return _Training(config, out, world, progress).run(state, command)
        except BaseException:
            if world.writes:
                release(out)
            raise


class _Training:
    """One run: its networks, what trains them, and where it stands."""

    def __init__(self, config: DistillConfig, out: Path, world: World, progress: Progress | None) -> None:
        self.config, self.out, self.world, self._progress = config, out, world, progress
        ready = prepare(config, world)
        self.splits, self.images, self.views = ready.splits, ready.images, ready.views
        self.student, self.teacher, self.setting = ready.student, ready.teacher, ready.setting
        self._copies = ready.copies
        self.network = ready.student.subject.network
        self.ema = self._averaged() if config.ema is not None else None
        self.optimizer = make_optimizer(self.network, config)
        self.learner: Any = None
        self.teacher_taps: Taps | None = None
        self.decision: probe.Decision | None = None
        self.teacher_accuracy: Accuracy | None = None
        self.epoch = self.step = self.updates = 0
        self.history: list[dict[str, Any]] = []
        self.sums = LossSums()
        self.probe_seconds = 0.0

    def run(self, state: dict[str, Any] | None, command: str) -> Distilled:
        """Train to the end, from a checkpoint where there is one."""
        config, started = self.config, time.perf_counter()
        self._command = command if state is None else state["command"]
        if state is not None:
            self.teacher_accuracy = Accuracy(*state["teacher"]) if state["teacher"] else None
            self.decision = probe.Decision(*state["decision"]) if state["decision"] else None
            self._equip()
            self._restore(state)
            logger.info("Going on at epoch %d, step %d of %d.", self.epoch + 1, self.step + 1, self.images.steps)
        else:
            if METHODS[config.method].chooses and (config.stages != "auto" or config.similarity):
                given = probe.finished_comparison(config.similarity) if config.similarity else None
                self._decide(given)
            self._equip()
            self._guard_teacher()
            self._probe("before")
            self._save()
        self._start_clock()
        while self.epoch < config.epochs:
            if self._choice_is_due():
                self._decide(self._probe("choice"))
                self._equip()
            self._train_epoch()
            self._end_epoch()
        self._probe("after")
        return self._finish(time.perf_counter() - started)

    def _start_clock(self) -> None:
        self._since, self._images_since, self._saved = time.perf_counter(), 0, time.monotonic()

    def _train_epoch(self) -> None:
        """The steps of an epoch that are still to be done."""
        config, device = self.config, self.world.device
        self.learner.train()
        for batch in self.images.epoch(self.epoch, first=self.step, pin=device.type == "cuda"):
            seed_everything(config.seed, self.world.rank, self.epoch, self.step)
            updates = (self.step + 1) % config.accumulate == 0
            with explaining_out_of_memory("a training step", self.network, config.batch_size):
                self._one_step(batch.to(device), updates=updates)
            self.step += 1
            self._images_since += config.batch_size * self.world.size
            if updates and self.updates % CHECK_EVERY == 0:
                self._look()
                due = time.monotonic() - self._saved >= 60 * config.checkpoint_minutes
                if due and self.step < self.images.steps:
                    self._save()

    def _one_step(self, batch: Batch, *, updates: bool) -> None:
        """Forward, backward, and at the end of a group of steps the update."""
        config = self.config
        images, teacher_images, target = self.views(batch)
        if config.channels_last:
            images, teacher_images = (x.to(memory_format=torch.channels_last) for x in (images, teacher_images))
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            teacher_logits, taken = self._taught(teacher_images)
            waits = self.wrapped.no_sync() if self.world.size > 1 and not updates else nullcontext()
            with waits:
                parts = self.wrapped(images, target, batch.indices, teacher_logits, taken)
                loss = torch.stack(list(parts.values())).sum()
                with torch.autocast(images.device.type, enabled=False):
                    (loss / config.accumulate).backward()
        self.sums.add(parts)
        if not updates:
            return
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.learner.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.schedule.step_update(self.updates)
        self.learner.method.after_update(self.network)
        if self.ema is not None:
            self.ema.update(self.network)

    @torch.no_grad()
    def _taught(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.teacher_taps is None:
            return images.new_zeros(len(images), 0), []
        return self.teacher_taps.run(images)

    def _equip(self) -> None:
        """Build the method for what is known of the stages; its parameters join the optimizer."""
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            method = METHODS[config.method](probe.setting_with(self.setting, self.decision)).to(self.world.device)
        self._untap()
        self.learner = Learner(self.network, method, copies=self._copies)
        extend_optimizer(self.optimizer, method, config)
        self.schedule = make_schedule(self.optimizer, config, self.images.steps // config.accumulate, self.updates)
        self.teacher_taps = Taps(self.teacher.subject.network, method.teacher_layers) if self.teacher else None
        if config.compile:
            torch.compiler.reset()  # what was compiled before calls the hooks of before
            for side in (self.student, self.teacher):
                if side is not None:
                    side.subject.network.compile()
        self.wrapped: Any = self.learner
        if self.world.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            on = [self.world.device] if self.world.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.learner, device_ids=on, broadcast_buffers=False)

    def _untap(self) -> None:
        for taps in (self.learner.taps if self.learner else None, self.teacher_taps):
            if taps is not None:
                taps.remove()

    def _choice_is_due(self) -> bool:
        undecided = METHODS[self.config.method].chooses and self.decision is None
        return undecided and self.epoch >= self.config.probe_epochs

    def _decide(self, similarity: Similarity | None) -> None:
        assert self.teacher is not None
        decision = None
        if self.world.writes:
            decision = probe.decide(self.student, self.teacher, self.config, similarity, self.setting.classes)
            outcome.write_yaml(self.out, "stages.yaml", decision.record)
        self.decision = self.world.from_first(decision)

    def _probe(self, when: str) -> Similarity | None:
        """Measure student against teacher and keep the result; on the first process alone."""
        if self.teacher is None or not self.world.writes:
            return None
        started = time.perf_counter()
        similarity = probe.measure(self.student, self.teacher, self.splits.held_out, self.config, self.world.device)
        outcome.write_similarity(self.out, when, similarity)
        self.probe_seconds += time.perf_counter() - started
        return similarity

    def _guard_teacher(self) -> None:
        if self.teacher is None:
            return
        subject = self.teacher.subject
        self.teacher_accuracy = self._evaluated(subject.network, subject.preprocessing.transform())
        logger.info("Teacher %s: %.2f%% of the held-out images.", subject.name, 100 * self.teacher_accuracy.top1)
        check_teacher(subject.name, self.teacher_accuracy, self.setting.classes)

    def _evaluated(self, network: nn.Module, transform: Any) -> Accuracy:
        config = self.config
        return evaluate(
            network,
            self.splits.held_out,
            transform,
            world=self.world,
            batch_size=config.batch_size,
            workers=config.workers,
            bf16=config.bf16,
        )

    def _end_epoch(self) -> None:
        """Evaluate, add a row to the metrics, keep a checkpoint."""
        self._look()
        self.world.average_buffers(self.network)
        transform = self.student.subject.preprocessing.transform()
        accuracy = self._evaluated(self.network, transform)
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        means = self.sums.means(self.world)
        row |= {"loss": sum(means.values()), **means, "top1": accuracy.top1, "top5": accuracy.top5}
        if self.ema is not None:
            row["top1_ema"] = self._evaluated(self.ema.module, transform).top1
        row["images_per_second"] = round(self._rate(), 1)
        self.history.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, LossSums()
        if self.world.writes:
            outcome.write_metrics(self.out, self.history)
        self._save()

    def _finish(self, seconds: float) -> Distilled:
        network = self.network if self.ema is None else self.ema.module
        preprocessing = self.student.subject.preprocessing
        accuracy = self._evaluated(network, preprocessing.transform())
        self._untap()
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.network._compiled_call_impl = None
        self.network.load_state_dict(state)
        student = self.network.cpu().eval()
        done = Distilled(student, accuracy, self.teacher_accuracy, self.history, self.out)
        if self.world.writes:
            outcome.write_student(self.out, student, state, preprocessing, self.splits.classes)
            times = {"seconds": round(seconds, 1), "probe_seconds": round(self.probe_seconds, 1)}
            result = {**self._result(done), "processes": self.world.size, **times, "versions": versions()}
            record = {"command": self._command, "options": asdict(self.config), "result": result}
            outcome.write_yaml(self.out, "run.yaml", record)
        return done

    def _result(self, done: Distilled) -> dict[str, Any]:
        return {
            "top1": done.accuracy.top1,
            "top1_interval": list(done.accuracy.interval()),
            "top5": done.accuracy.top5,
            "held_out": done.accuracy.images,
            "teacher_top1": done.teacher.top1 if done.teacher else None,
            "student": {**self.student.subject.source, "parameters": parameters(done.student)},
            "teacher": dict(self.teacher.subject.source) if self.teacher else None,
        }

    def _look(self) -> None:
        """Stop where a part of the loss is not finite; tell where the training is."""
        names = self.sums.broken_parts(self.world)
        if names:
            raise TrainingError(
                f"Every part of the loss must be finite, but {', '.join(map(repr, names))} was not, in epoch "
                f"{self.epoch + 1} by update {self.updates}. The checkpoint before it is kept. Lower --lr, set --clip, "
                "or lengthen --warmup-epochs."
            )
        if self._progress is not None and self.world.writes:
            left = (self.config.epochs - self.epoch) * self.images.steps - self.step
            rate = self._rate()
            seconds = left * self.config.batch_size * self.world.size / rate if rate else 0.0
            top1 = self.history[-1]["top1"] if self.history else None
            self._progress(Live(self.epoch + 1, self.config.epochs, rate, seconds, self.sums.own_means(), top1))

    def _rate(self) -> float:
        return self._images_since / max(time.perf_counter() - self._since, 1e-9)

    def _save(self) -> None:
        if self.world.writes:
            decision = self.decision
            state = {
                "command": self._command,
                "config": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.config).items()},
                "student": self.network.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema is not None else None,
                "method": self.learner.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "position": [self.epoch, self.step, self.updates],
                "sums": self.sums.state(),
                "history": self.history,
                "decision": [decision.stages, decision.matches, decision.record] if decision else None,
                "teacher": list(asdict(self.teacher_accuracy).values()) if self.teacher_accuracy else None,
                "probe_seconds": self.probe_seconds,
            }
            save_checkpoint(self.out, state)
        self._saved = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        """Put everything where the checkpoint says. Random numbers need none: they follow from the position."""
        self.network.load_state_dict(state["student"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.learner.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.updates = state["position"]
        self.schedule = make_schedule(
            self.optimizer, self.config, self.images.steps // self.config.accumulate, self.updates
        )
        self.sums = LossSums.of(state["sums"], self.world.device)
        self.history = state["history"]
        self.probe_seconds = state["probe_seconds"]

    def _averaged(self) -> Any:
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.network, decay=self.config.ema)
