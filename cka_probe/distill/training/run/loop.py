"""The loop over epochs and steps, the same for all methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from cka_probe.distill.outputs.outcome import Row
from cka_probe.distill.training.best import better, out_of_patience
from cka_probe.distill.training.divergence import advice, broken_weights
from cka_probe.distill.training.progress import Estimate, Live, Progress, epoch_line
from cka_probe.distill.training.run import comparisons
from cka_probe.distill.training.run.epoch_end import end_epoch
from cka_probe.distill.training.run.run import Run
from cka_probe.errors import TrainingError
from cka_probe.runtime.folder.checkpoint import PREVIOUS
from cka_probe.runtime.randomness import seed_everything

logger = logging.getLogger(__name__)

CHECK_EVERY = 20
"""Updates between two checks whether the loss is finite, and whether a checkpoint is due."""


class TrainingLoop:
    """Trains a run that has begun, until its last epoch.

    Args:
        run: what is trained.
        progress: called at each check, on the process that writes; None for nothing.
        add_row: called with each new row of the metrics.
    """

    def __init__(self, run: Run, progress: Progress | None, add_row: Callable[[Row], None]) -> None:
        self._run, self._progress, self._add_row = run, progress, add_row
        config = run.config
        evaluated = len(run.scores.images) * len(run.networks) / (config.batch_size * run.world.size)
        self._estimate = Estimate(config.epochs - run.state.epoch, run.ready.images.steps, evaluated, run.world.device)
        self._started, self._first_epoch = time.monotonic(), run.state.epoch
        self._epoch_started, self._first_step = time.perf_counter(), run.state.step

    def __call__(self) -> None:
        """Train until the last epoch, or until patience ends."""
        run, method = self._run, comparisons.by_comparison(self._run)
        while run.state.epoch < run.config.epochs and not self._stops_early():
            if method is not None and comparisons.is_undecided(run) and run.state.epoch >= method.probe_epochs:
                comparisons.choose_stages(run)
            self._train_epoch()
            row = end_epoch(run, self._rate(), self._add_row)
            state, epochs = run.state, run.config.epochs
            spent = (time.monotonic() - self._started) / (state.epoch - self._first_epoch)
            logger.info("%s", epoch_line(row, epochs, spent * (epochs - state.epoch)))

    def _stops_early(self) -> bool:
        run = self._run
        undecided = comparisons.is_undecided(run)
        return not undecided and out_of_patience(run.state.best, run.state.epoch, run.config.patience)

    def _train_epoch(self) -> None:
        """The steps of an epoch that are still to be done."""
        run, config, state, train = self._run, self._run.config, self._run.state, self._run.train
        images = run.ready.images
        self._epoch_started, self._first_step = time.perf_counter(), state.step
        train.learner.train()
        for batch in images.epoch(state.epoch, first=state.step, pin=run.world.device.type == "cuda"):
            seed_everything(config.seed, run.world.rank, state.epoch, state.step)
            update = (state.step + 1) % config.accumulate == 0
            state.sums.add(train(batch, update=update))
            if train.learner.right is not None:
                state.correct = state.correct + train.learner.right
            state.step += 1
            line = self._estimate.step()
            if line:
                logger.info("%s", line)
            if update and train.updates % CHECK_EVERY == 0:
                self._check_loss()
                due = time.monotonic() - run.saved >= 60 * config.checkpoint_minutes
                if due and state.step < images.steps:
                    self._check_weights()
                    run.save()
        self._check_loss()
        self._check_weights()

    def _check_loss(self) -> None:
        """Stop if a part of the loss is not finite; report the progress."""
        run = self._run
        names = run.state.sums.broken_parts(run.world)
        if names:
            self._stop(f"Every part of the loss must be finite, but {', '.join(map(repr, names))} was not", names)
        if run.train.overflows:
            self._stop("The gradients must be finite in float16, but were not at any scale of the loss", ())
        if self._progress is not None and run.world.writes:
            self._progress(self._live())

    def _live(self) -> Live:
        config, state, rate = self._run.config, self._run.state, self._rate()
        left = (config.epochs - state.epoch) * self._run.ready.images.steps - state.step
        seconds = left * config.batch_size * self._run.world.size / rate if rate else 0.0
        top1 = better(state.history[-1])[1] if state.history else None
        return Live(state.epoch + 1, config.epochs, rate, seconds, state.sums.own_means(), top1)

    def _check_weights(self) -> None:
        """Stop if the weights are not finite after the last update, whose loss is not known yet."""
        names = broken_weights(self._run.train.learner, self._run.world)
        if names:
            named = f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            self._stop(f"The weights must be finite before a checkpoint is kept, but those of {named} were not", ())

    def _stop(self, what: str, broken: Sequence[str]) -> NoReturn:
        """Raise a TrainingError that names the checkpoints and the likely cause."""
        run, state = self._run, self._run.state
        there = f"The last checkpoint is of update {run.saved_update}."
        if (run.folder.checkpoints / PREVIOUS).exists():
            there += " If its weights are broken, --resume --resume-from previous goes on from the one before it."
        raise TrainingError(
            f"{what}, in epoch {state.epoch + 1} by update {run.train.updates}. {there} "
            f"{advice(run.config, broken, state.sums.last_finite())}"
        )

    def _rate(self) -> float:
        """Images per second in this epoch, of all processes."""
        run = self._run
        images = (run.state.step - self._first_step) * run.config.batch_size * run.world.size
        return images / max(time.perf_counter() - self._epoch_started, 1e-9)
