"""How a run begins: new, or from a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from cka_probe.distill import probe
from cka_probe.distill.outputs import outcome
from cka_probe.distill.training.best import warn_if_slow
from cka_probe.distill.training.resuming import check_made_of
from cka_probe.distill.training.run import comparisons
from cka_probe.distill.training.run.run import Run
from cka_probe.runtime.folder.checkpoint import LAST as LAST_CHECKPOINT
from cka_probe.runtime.folder.checkpoint import write_checkpoint
from cka_probe.runtime.folder.run_folder import PRIVATE

logger = logging.getLogger(__name__)


def begin(run: Run, checkpoint: Mapping[str, Any] | None, add_row: Callable[[outcome.Row], None]) -> None:
    """Start a run, or go on from a checkpoint.

    Args:
        run: whose state is set.
        checkpoint: to go on from; None for a new run.
        add_row: called with each row of the metrics that there is.

    Raises:
        CkaProbeError: the options, the data or the networks do not allow it.
    """
    _log_images(run)
    config, steps = run.config, run.ready.images.steps
    if config.ema is not None:
        warn_if_slow(config.ema, steps // config.accumulate * config.epochs)
    method = comparisons.by_comparison(run)
    if method is not None and method.measures_stages:
        probe.check_enough(run.ready.parts.probed, config)
    if checkpoint is None:
        _start(run)
    else:
        if run.world.writes:
            check_made_of(run.made_of, checkpoint["made_of"])
        run.restore(checkpoint)
        for row in run.state.history:
            add_row(row)
        logger.info("Resuming at epoch %d, step %d of %d.", run.state.epoch + 1, run.state.step + 1, steps)


def _log_images(run: Run) -> None:
    named = {"train": "for training", "validation": "for validation", "test": "for the test"}
    counts = run.ready.parts.counts
    logger.info("Images: %s.", ", ".join(f"{count:,} {named[part]}" for part, count in counts.items()))


def _start(run: Run) -> None:
    """Choose the stages if nothing need be measured for it, compare the networks, write the first checkpoint."""
    method = comparisons.by_comparison(run)
    if method is not None and not method.measures_stages:
        comparisons.decide(run, probe.finished_comparison(method.similarity) if method.similarity else None)
    run.train.equip(run.state.decision)
    run.state.guard = run.scores.guard_teacher()
    similarity = comparisons.measure(run)
    if similarity is not None and comparisons.is_undecided(run):
        probe.warn_if_few(similarity, run.ready.parts.probed, run.config)
    if run.world.writes:  # nothing of an earlier run is removed before this one can be resumed
        decision = run.state.decision
        with run.folder.starting("distill") as stage:
            outcome.stage_first(stage, decision.record if decision else None, similarity)
            write_checkpoint(stage / PRIVATE / LAST_CHECKPOINT, run.checkpoint())
    run.saved = time.monotonic()
