"""distill(): the whole training, from specs to files; the one loop for all methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.distill import outcome, probe
from cka_probe.distill.checkpoint import load_checkpoint, save_checkpoint
from cka_probe.distill.config import DistillConfig, check
from cka_probe.distill.evaluation import Accuracy, evaluate
from cka_probe.distill.folder import check_same, claim
from cka_probe.distill.labelled import Splits, open_splits
from cka_probe.distill.learner import Learner, extend_optimizer, make_optimizer, make_schedule
from cka_probe.distill.methods import METHODS, Setting
from cka_probe.distill.pipeline import Batch, TrainingImages, Views, seed_everything
from cka_probe.distill.subjects import Examined, check_teacher, examine, load_student, load_teacher, parameters
from cka_probe.distill.sums import LossSums
from cka_probe.distill.taps import Taps, changed_in_place
from cka_probe.distill.world import World, joined
from cka_probe.errors import DataError, SpecError, TrainingError
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
    with joined(config.device) as world, _keeping_random_state():
        if world.writes:
            claim(out, resume=resume, overwrite=overwrite)
        state = world.from_first(load_checkpoint(out) if resume and world.writes else None)
        if state is not None:
            check_same(config, state["config"])
        return _Training(config, out, world, progress).run(state, command)


class _Training:
    """One run: its networks, what trains them, and where it stands."""

    def __init__(self, config: DistillConfig, out: Path, world: World, progress: Progress | None) -> None:
        self.config, self.out, self.world, self._progress = config, out, world, progress
        self.splits: Splits = open_splits(
            config.data, data_dir=config.data_dir, download=config.download, memory=config.memory
        )
        classes = len(self.splits.classes)
        student = load_student(config, classes)
        needs_teacher = METHODS[config.method].needs_teacher
        teacher = load_teacher(config, classes) if needs_teacher else None
        self.student: Examined = examine(student, config.student_layers, world.device)
        self.teacher: Examined | None = (
            examine(teacher, config.teacher_layers, world.device) if teacher is not None else None
        )
        seen = student.preprocessing
        self.views = Views(config, classes, seen, teacher.preprocessing if teacher else seen, world.device)
        if teacher is not None and teacher.preprocessing.size[0] != seen.size[0]:
            raise SpecError(
                f"Student and teacher must see the same channels, but the student sees {seen.size[0]} and the "
                f"teacher {teacher.preprocessing.size[0]} (in_chans=N after a model's name)."
            )
        sizes = [seen.size, *([teacher.preprocessing.size] if teacher else [])]
        self.images = TrainingImages(
            self.splits.train, config, max(sizes, key=lambda size: size[1] * size[2]), world.rank, world.size
        )
        if not self.images.steps:
            raise DataError(
                f"The training images must fill a batch of {config.batch_size * world.size * config.accumulate}, but "
                f"{self.splits.train.name} holds {len(self.splits.train)}. Make --batch-size or --accumulate smaller."
            )
        self.network = self.student.subject.network
        self._copies = changed_in_place(self.network, self.student.side.stages, self._noise())
        if config.channels_last:
            for network in self._networks():
                network.to(memory_format=torch.channels_last)
        self.ema = self._averaged() if config.ema is not None else None
        if config.compile:
            for network in self._networks():
                network.compile()
        self.setting = Setting(
            config, classes, len(self.splits.train), self.student.side, self.teacher.side if self.teacher else None
        )
        self.optimizer = make_optimizer(self.network, config)
        self.learner: Any = None
        self.teacher_taps: Taps | None = None
        self.decision: probe.Decision | None = None
        self.teacher_accuracy: Accuracy | None = None
        self.epoch = self.step = self.updates = 0
        self.history: list[dict[str, Any]] = []
        self.sums = LossSums()
        self.seconds = {"probe": 0.0, "train": 0.0}

    def run(self, state: dict[str, Any] | None, command: str) -> Distilled:
        """Train to the end, from a checkpoint where there is one."""
        config, started = self.config, time.perf_counter()
        if state is not None:
            self.teacher_accuracy = Accuracy(*state["teacher"]) if state["teacher"] else None
            self.decision = probe.Decision(*state["decision"]) if state["decision"] else None
            self._equip()
            self._restore(state)
            logger.info("Going on at epoch %d, step %d of %d.", self.epoch + 1, self.step + 1, self.images.steps)
        else:
            self._guard_teacher()
            self._probe("before")
            if METHODS[config.method].chooses and (config.stages != "auto" or config.similarity):
                given = probe.finished_comparison(config.similarity) if config.similarity else None
                self._decide(given)
            self._equip()
            self._save()
        self._since, self._images_since, self._saved = time.perf_counter(), 0, time.monotonic()
        while self.epoch < config.epochs:
            if self._choice_is_due():
                self._decide(self._probe("choice"))
                self._equip()
            self._train_epoch()
            self._end_epoch()
        self._probe("after")
        return self._finish(command, time.perf_counter() - started)

    def _train_epoch(self) -> None:
        """The steps of an epoch that are still to be done."""
        config, device = self.config, self.world.device
        self.learner.train()
        for batch in self.images.epoch(self.epoch, first=self.step, pin=device.type == "cuda"):
            seed_everything(config.seed, self.world.rank, self.epoch, self.step)
            updates = (self.step + 1) % config.accumulate == 0
            with explaining_out_of_memory(self.student.subject.name, self.network, config.batch_size):
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
        self.seconds["probe"] += time.perf_counter() - started
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

    def _finish(self, command: str, seconds: float) -> Distilled:
        network = self.network if self.ema is None else self.ema.module
        preprocessing = self.student.subject.preprocessing
        accuracy = self._evaluated(network, preprocessing.transform())
        self._untap()
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.network._compiled_call_impl = None
        self.network.load_state_dict(state)
        student = self.network.cpu().eval()
        if self.world.writes:
            outcome.write_student(self.out, student, state, preprocessing, self.splits.classes)
            low, high = accuracy.interval()
            result = {
                "top1": accuracy.top1,
                "top1_interval": [low, high],
                "top5": accuracy.top5,
                "held_out": accuracy.images,
                "teacher_top1": self.teacher_accuracy.top1 if self.teacher_accuracy else None,
                "student": {**self.student.subject.source, "parameters": parameters(student)},
                "teacher": dict(self.teacher.subject.source) if self.teacher else None,
                "processes": self.world.size,
                "seconds": round(seconds, 1),
                "probe_seconds": round(self.seconds["probe"], 1),
                "versions": versions(),
            }
            record = {"command": command, "options": asdict(self.config), "result": result}
            outcome.write_yaml(self.out, "run.yaml", record)
        return Distilled(student, accuracy, self.teacher_accuracy, self.history, self.out)

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
                "probe_seconds": self.seconds["probe"],
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
        self.seconds["probe"] = state["probe_seconds"]

    def _networks(self) -> Iterator[Any]:
        yield self.network
        if self.teacher is not None:
            yield self.teacher.subject.network

    def _noise(self) -> Tensor:
        return torch.zeros(2, *self.student.subject.preprocessing.size, device=self.world.device)

    def _averaged(self) -> Any:
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.network, decay=self.config.ema)


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """Within the block, the global generators may be seeded at will; afterwards they are as they were."""
    import random

    import numpy as np

    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
