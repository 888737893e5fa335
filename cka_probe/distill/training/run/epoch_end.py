"""What an epoch ends with: evaluation, a row of the metrics, the best weights, a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from cka_probe.distill.outputs import outcome
from cka_probe.distill.training.best import Best, better
from cka_probe.distill.training.run.run import Run, copied_weights

logger = logging.getLogger(__name__)


def end_epoch(run: Run, images_per_second: float, add_row: Callable[[outcome.Row], None]) -> dict[str, Any]:
    """Evaluate, add a row to the metrics, keep the best weights, write a checkpoint, and begin the next epoch.

    Args:
        run: whose epoch has no more steps.
        images_per_second: of the training.
        add_row: called with the row.

    Returns:
        The row.
    """
    row = _metrics(run, images_per_second)
    _add_to_history(run, row)
    add_row(row)
    _keep_best(run, row)
    run.state.next_epoch()
    if run.world.writes:
        outcome.write_metrics(run.folder, run.state.history)
    run.save()
    return row


def _metrics(run: Run, images_per_second: float) -> dict[str, Any]:
    """The row of metrics.csv."""
    state, train, world = run.state, run.train, run.world
    row: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "updates": train.updates,
        "lr": train.optimizer.param_groups[0]["lr"],
    }
    means = state.sums.means(world)
    row |= {"loss": sum(means.values()), **means}
    if train.learner.right is not None:
        seen = run.ready.images.steps * run.config.batch_size * world.size
        row["train_top1"] = float(world.sum(state.correct)) / seen
    for network in run.networks.values():
        world.share_buffers(network)  # those of rank 0 are exported
    further = train.learner.loss.scored
    for scored in further.values():
        world.share_buffers(scored.network)
    done = state.epoch + 1
    if done % run.config.method.score_epochs == 0 or done == run.config.epochs:
        row |= run.scores.epoch(run.networks, further)
    row["images_per_second"] = round(images_per_second, 1)
    return row


def _add_to_history(run: Run, row: dict[str, Any]) -> None:
    """Add a row; log the method's cautions that come with it."""
    method, history, epochs = run.config.method, run.state.history, run.config.epochs
    known = method.cautions(history, epochs)
    history.append(row)
    for caution in method.cautions(history, epochs):
        if caution not in known:
            logger.warning("%s", caution)


def _keep_best(run: Run, row: outcome.Row) -> None:
    """Keep the weights of this epoch if their validation top-1 is above that of all epochs before."""
    state = run.state
    which, top1 = better(row)
    if top1 is None or (state.best is not None and top1 <= state.best.top1):
        return
    weights = copied_weights(run.networks[which]) if run.world.writes else {}
    state.best = Best(state.epoch + 1, which, top1, weights)
