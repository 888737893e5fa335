"""What a run consists of, what it has reached, and what its checkpoints hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.distill.config import Training, as_record
from cka_probe.distill.outputs.export import model_config
from cka_probe.distill.preparation import Prepared
from cka_probe.distill.probe import Decision
from cka_probe.distill.teacher_cache.cache import TeacherCache
from cka_probe.distill.teacher_cache.key import key_of
from cka_probe.distill.training.best import AVERAGE, LAST, Best
from cka_probe.distill.training.head import with_head_alone
from cka_probe.distill.training.knn_scores import KnnScores
from cka_probe.distill.training.resuming import made_of
from cka_probe.distill.training.scores import Scores
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.sums import LossSums
from cka_probe.runtime.folder.checkpoint import save_checkpoint
from cka_probe.runtime.folder.run_folder import RunFolder
from cka_probe.runtime.world import World


@dataclass
class RunState:
    """What a run has reached, beside its weights and its optimizer.

    Attributes:
        command: that repeats the run.
        correct: (), float64: training images of this epoch that the student classified correctly.
        epoch: under way, from 0.
        step: of the epoch, the next one, from 0.
        sums: of the parts of the loss in this epoch.
        history: the metrics, a row per epoch that has ended.
        decision: the stages that take part; None before they are chosen, and for a method without stages.
        guard: what `Scores.guard_teacher` measured.
        best: weights so far.
        earlier_seconds: that the run took before it was resumed.
        probe_seconds: that the comparisons of student and teacher took.
        started: when this process began, by the monotonic clock.
    """

    command: str
    correct: Tensor
    epoch: int = 0
    step: int = 0
    sums: LossSums = field(default_factory=LossSums)
    history: list[dict[str, Any]] = field(default_factory=list)
    decision: Decision | None = None
    guard: dict[str, Any] | None = None
    best: Best | None = None
    earlier_seconds: float = 0.0
    probe_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """That the run took so far."""
        return self.earlier_seconds + time.monotonic() - self.started

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.sums, self.correct = LossSums(), torch.zeros_like(self.correct)

    def record(self) -> dict[str, Any]:
        """What `restore` needs."""
        decision = self.decision
        return {
            "command": self.command,
            "position": [self.epoch, self.step],
            "sums": self.sums.state(),
            "history": self.history,
            "decision": [decision.stages, decision.matches, decision.record] if decision else None,
            "right": float(self.correct),
            "best": self.best.plain() if self.best is not None else None,
            "guard": self.guard,
            "seconds": self.seconds,
            "probe_seconds": self.probe_seconds,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take over what `record` gave. Random numbers need none: they follow from the position."""
        self.command = record["command"]
        self.epoch, self.step = record["position"]
        self.sums = LossSums.of(record["sums"], self.correct.device)
        self.correct = torch.full_like(self.correct, record["right"])
        self.history = record["history"]
        self.decision = Decision(*record["decision"]) if record["decision"] else None
        self.guard, self.best = record["guard"], Best.of(record["best"])
        self.earlier_seconds, self.probe_seconds = record["seconds"], record["probe_seconds"]


class Run:
    """A run: the data and the networks, the optimization step, the state, the folder.

    Args:
        ready: the data and the networks.
        folder: of the run.
        world: the processes.
        command: that repeats the run.

    Attributes:
        ready: as above; with ``--train head``, the classifier alone is trained.
        folder: as above.
        world: as above.
        train: one optimization step.
        scores: the accuracies; those of nearest neighbours if the method uses no labels.
        cache: of the teacher's outputs; None without one.
        state: what the run has reached.
        model_config: of the student, for config.json.
        made_of: hashes of what the run is made from; on the process that writes alone.
        keep_previous: whether the next checkpoint leaves the one before the last as it is.
        saved: when the last checkpoint was written, by the monotonic clock.
        saved_update: number of updates that the last checkpoint holds.
    """

    def __init__(self, ready: Prepared, folder: RunFolder, world: World, command: str) -> None:
        config = ready.setting.config
        if config.train == "head":
            ready = with_head_alone(ready, config, world)
        self.ready, self.folder, self.world = ready, folder, world
        labels = config.method.uses_labels
        self.model_config = model_config(ready.student.subject, ready.parts.classes if labels else None)
        self.made_of: dict[str, str] = {}
        if world.writes:
            given = ready.teacher.subject if ready.teacher and not config.method.follows_student else None
            self.made_of = made_of(ready.parts, ready.student.subject, given)
        self.cache = self._opened_cache()
        self.train = TrainingStep(ready, config, world, self.cache)
        self.scores: Any = KnnScores(ready, config, world) if not labels else Scores(ready, config, world, self.cache)
        self.state = RunState(command, torch.zeros((), dtype=torch.float64, device=world.device))
        self.keep_previous = False
        self.saved, self.saved_update = time.monotonic(), 0

    def _opened_cache(self) -> TeacherCache | None:
        """The cache of the teacher's outputs, where there is one."""
        folder = self.config.teacher_cache
        if folder is None:
            return None
        key = key_of(self.ready, self.config, self.world, self.world.from_first(self.made_of))
        return TeacherCache(Path(folder), key)

    @property
    def config(self) -> Training:
        """All options."""
        return self.ready.setting.config

    @property
    def network(self) -> nn.Module:
        """The student."""
        return self.train.network

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The student, and the average of its weights if there is one."""
        return {LAST: self.network} | ({AVERAGE: self.train.average} if self.train.average is not None else {})

    def checkpoint(self) -> dict[str, Any]:
        """What `restore` needs, and what a run that resumes compares with its own options, files and networks."""
        return {
            "config": as_record(self.config),
            "made_of": self.made_of,
            "images": self.ready.parts.counts,
            **self.train.state(),
            **self.state.record(),
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.state.restore(checkpoint)
        self.train.equip(self.state.decision)
        self.train.restore(checkpoint)
        self.saved_update = self.train.updates

    def save(self) -> None:
        """Write a checkpoint."""
        if self.world.writes:
            save_checkpoint(self.folder, "distill", self.checkpoint(), keep_previous=self.keep_previous)
        self.keep_previous = False
        self.saved, self.saved_update = time.monotonic(), self.train.updates


def copied_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network, copied to the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
