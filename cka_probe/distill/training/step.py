"""One optimization step: teacher and student forward, the parts of the loss, backward, update, average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.forward import keep_buffers
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.activations.taps import Taps, changed_in_place
from cka_probe.distill import probe
from cka_probe.distill.config import Training
from cka_probe.distill.mixed_precision import autocast
from cka_probe.distill.preparation import Prepared
from cka_probe.distill.teacher_cache.cache import Output, TeacherCache, checksum
from cka_probe.distill.training.learner import (
    Learner,
    explaining_batch_norm,
    extend_optimizer,
    in_single,
    make_optimizer,
    make_schedule,
)
from cka_probe.distill.training.pipeline import Batch
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import listed
from cka_probe.runtime.world import World

LEAST_SCALE = 1e-4
"""A loss scale below this says that gradients are infinite or NaN for another reason than the range of float16."""


class TrainingStep:
    """What is trained and what trains it. Called with a batch, it does one step.

    It knows a method by its `MethodLoss` alone: its parameters are trained beside the student's, whatever network they
    belong to; its buffers and untrained copies are kept in checkpoints; the parts of the loss are its own, labels used
    or not; and it is called after each update.

    Args:
        ready: the networks, and from a batch to what each sees.
        config: how to train.
        world: the processes.
        cache: of the teacher's outputs.

    Attributes:
        network: the student.
        average: of the student's weights, as a network; None without one.
        optimizer: of the student's parameters, and of the method's.
        learner: student and the method's loss, once `equip` has built the loss.
        updates: done so far.
    """

    learner: Learner

    def __init__(self, ready: Prepared, config: Training, world: World, cache: TeacherCache | None = None) -> None:
        self._ready, self._config, self._world = ready, config, world
        self.network = ready.student.subject.network
        self._ema = _averaged(self.network, config.ema) if config.ema is not None else None
        self.average: nn.Module | None = self._ema.module if self._ema is not None else None
        self.optimizer = make_optimizer(self.network, config)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.fp16)  # else it changes nothing
        self.updates = 0
        self._since_update = 0  # steps of the group that the next update closes
        self._updates_an_epoch = ready.images.steps // config.accumulate
        self._cache = cache
        self._taps: list[Taps] = []
        self._teacher_taps: Taps | None = None

    def equip(self, decision: probe.Decision | None) -> None:
        """Build the method for what is known of the stages; its parameters join the optimizer."""
        config, ready = self._config, self._ready
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            loss = config.method.build(probe.setting_with(ready.setting, decision)).to(self._world.device)
        self.release()
        trained = self.network if ready.trained is None else ready.trained
        self.learner = Learner(
            trained, loss, copies=ready.copies, name=ready.student.subject.name, compiled=config.compile
        )
        extend_optimizer(self.optimizer, loss, config)
        self._schedule = make_schedule(self.optimizer, config, self._updates_an_epoch, self.updates)
        if ready.teacher is not None:
            teacher = ready.teacher.subject
            self._teacher_taps = Taps(
                teacher.network,
                loss.teacher_layers,
                name=teacher.name,
                compiled=config.compile,
                classes=loss.classes if config.method.needs.logits else 0,
            )
            zeros = torch.zeros(2, *teacher.preprocessing.size, device=self._world.device)
            if changed_in_place(teacher.network, loss.teacher_layers, zeros, teacher.name):
                self._teacher_taps.keep_copies()
            if not config.method.follows_student:
                keep_buffers(teacher.network)
            if self._cache is not None:
                self._cache.expect(self._outputs(zeros), ready.images.steps, config.epochs)
        self._taps = [self.learner.taps, *([self._teacher_taps] if self._teacher_taps else [])]
        if config.compile:
            torch.compiler.reset()  # what was compiled before calls the hooks of before
            for side in (ready.student, ready.teacher):
                if side is not None:
                    side.subject.network.compile()
        self._wrapped: Any = self.learner
        if self._world.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            on = [self._world.device] if self._world.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                self.learner,
                device_ids=on,
                broadcast_buffers=False,
                find_unused_parameters=ready.leaves_parameters,  # such as those of auxiliary heads
            )

    def __call__(self, batch: Batch, *, update: bool) -> dict[str, Tensor]:
        """Train on a batch.

        Args:
            batch: of this process.
            update: whether the step closes a group of ``--accumulate`` steps, and the optimizer updates the weights.

        Returns:
            The parts of the loss.

        Raises:
            OutOfMemoryError: the device is too small.
        """
        count = len(batch.labels)
        with explaining_out_of_memory("a training step", self.network, count), explaining_batch_norm(count):
            pixels = checksum(batch.images) if self._cache is not None else b""
            parts = self._backward(batch.to(self._world.device), pixels, waits=not update)
            self._since_update += 1
            if update:
                self._update()
        return parts

    @torch.no_grad()
    def teach(self, images: Callable[[], Tensor], pixels: bytes = b"") -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits on its images, and what the method needs of its activations; empty without a teacher.

        Random numbers that it draws are no part of the student's: they follow from the seed and the step.

        Args:
            images: makes (n, c, h, w) as the teacher gets them; not called where the outputs are known.
            pixels: a checksum of the batch, where there is a cache.
        """
        if self._teacher_taps is None:
            return torch.zeros(0, 0, device=self._world.device), []
        if self._cache is None:
            return self._taught(images())
        known = self._cache.read(*self._position(), pixels)
        if known is not None:
            outputs = [output.to(self._world.device, non_blocking=True) for output in known]
        else:
            logits, taken = self._taught(images())
            outputs = self._cache.write(*self._position(), pixels, [*([logits] if logits.shape[1] else []), *taken])
        if self._config.method.needs.logits:
            return outputs[0], outputs[1:]
        return torch.zeros(0, 0, device=self._world.device), outputs

    def _taught(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        assert self._teacher_taps is not None
        epoch, step = self._position()
        key = (self._config.seed, self._world.rank, epoch, step, 1)
        if self._config.channels_last:
            images = _channels_last(images)
        logits, taken = self._teacher_taps.run(images, self._place(), key)
        return logits, self.learner.loss.of_teacher([in_single(value) for value in taken])

    def release(self) -> None:
        """Take all hooks off the networks."""
        for taps in self._taps:
            taps.remove()
        if self._taps:
            self.learner.loss.release()

    @property
    def overflows(self) -> bool:
        """Whether so many steps were skipped in a row that no scale of the loss keeps gradients finite in float16."""
        return self._scaler.is_enabled() and self._scaler.get_scale() < LEAST_SCALE

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {
            "student": self.network.state_dict(),
            "ema": self.average.state_dict() if self.average is not None else None,
            "method": self.learner.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "updates": self.updates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put everything where `state` says; the method is built already, for the same decision."""
        self.network.load_state_dict(state["student"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.learner.loss.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state.get("scaler", {}))  # earlier versions kept none, and had no float16
        self.updates = state["updates"]
        self._since_update = 0
        self._schedule = make_schedule(self.optimizer, self._config, self._updates_an_epoch, self.updates)

    @property
    def _all_updates(self) -> int:
        """Of the whole run."""
        return self._updates_an_epoch * self._config.epochs

    @torch.no_grad()
    def _outputs(self, images: Tensor) -> list[Output]:
        """What the cache stores of a step.

        Raises:
            SpecError: the method needs more of the teacher than logits and vectors.
        """
        config, loss = self._config, self.learner.loss
        with autocast(config, images.device):
            logits, taken = self._taught(images)
        named = {"logits": logits} if config.method.needs.logits else {}
        named |= dict(zip(loss.teacher_features, taken, strict=True))
        large = [name for name, value in named.items() if value.ndim != 2]
        if large:
            raise SpecError(
                f"--teacher-cache stores logits and pooled features, but --method {config.method.name} needs all "
                f"positions of {listed(large)} of the teacher. Train without a cache."
            )
        half = torch.float16 if config.teacher_cache_dtype == "float16" else None
        return [
            Output(name, (config.batch_size, value.shape[1]), half or value.dtype, value.dtype)
            for name, value in named.items()
        ]

    def _position(self) -> tuple[int, int]:
        """The epoch and the step in it, from 0."""
        done = self.updates * self._config.accumulate + self._since_update
        return divmod(done, max(self._ready.images.steps, 1))

    def _place(self) -> str:
        epoch, step = self._position()
        return f"in epoch {epoch + 1}, step {step + 1} of {self._ready.images.steps}"

    def _backward(self, batch: Batch, pixels: bytes, *, waits: bool) -> dict[str, Tensor]:
        """Add the gradients of a batch; where more follow before the update, the processes do not exchange them yet."""
        config = self._config
        images, teacher_images, target = self._ready.views(batch)
        self.learner.place = self._place()
        if config.channels_last:
            images = _channels_last(images)
        if not self._since_update:
            self.learner.loss.before_step(self.network, self.updates / self._all_updates)
        with autocast(config, self._world.device):
            teacher_logits, taken = self.teach(teacher_images, pixels)
            with self._wrapped.no_sync() if self._world.size > 1 and waits else nullcontext():
                parts: dict[str, Tensor] = self._wrapped(images, target, batch.indices, teacher_logits, taken)
                loss = torch.stack(list(parts.values())).sum()
                with torch.autocast(self._world.device.type, enabled=False):
                    self._scaler.scale(loss / config.accumulate).backward()
        return parts

    def _update(self) -> None:
        # Gradients that overflow in float16 are as usual with a scaler: it skips the optimizer's step and halves the
        # scale. The update counts all the same, as in timm: schedule, average and method go on, so that the position
        # in the epoch follows from the updates, and the host need not ask the device which were skipped.
        if self._config.clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learner.parameters(), self._config.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1
        self._since_update = 0
        self._schedule.step_update(self.updates)
        self.learner.loss.after_update(self.network, self.updates / self._all_updates)
        if self._ema is not None:
            self._ema.update(self.network, step=self.updates)


def _channels_last(images: Any) -> Any:
    """Images, or each of several kinds of crops, in that memory format; features as they are."""
    if isinstance(images, tuple):
        return tuple(map(_channels_last, images))
    return images.to(memory_format=torch.channels_last) if images.ndim == 4 else images


def _averaged(network: nn.Module, decay: float) -> Any:
    from timm.utils import ModelEmaV3

    # With its warm-up, the first update replaces the initial weights altogether.
    return ModelEmaV3(network, decay=decay, use_warmup=True)
