"""How a run ends: the last comparison, the test, the exported weights, the record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cka_probe.distill.config import as_record
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.outputs import outcome
from cka_probe.distill.outputs.words import WORDS, save_words
from cka_probe.distill.training.best import AVERAGE, LAST, better
from cka_probe.distill.training.run import comparisons
from cka_probe.distill.training.run.run import Run, copied_weights
from cka_probe.errors import CkaProbeError
from cka_probe.images.broken import broken_record, describe_broken

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distilled:
    """The result of a distillation.

    Attributes:
        student: the network in evaluation mode on the CPU, with the exported weights; None if the run was finished
            before.
        accuracy: of the student on the test images; by nearest neighbours if the training used no labels, and None if
            the data have none.
        teacher: accuracy of the teacher on the same images; None without one.
        metrics: a row per epoch.
        result: as run.yaml holds it: the parts of the data, the best epoch, and more.
        out: the folder of the run; None if it left no files behind.
        wrote: whether this process, of several, wrote the files in it.
    """

    student: nn.Module | None
    accuracy: Accuracy | None
    teacher: Accuracy | None
    metrics: list[dict[str, Any]]
    result: Mapping[str, Any]
    out: Path | None
    wrote: bool = True


def finish(run: Run) -> Distilled:
    """Compare the trained student with the teacher, test, export and record it."""
    _compare(run)
    _picture_words(run)
    state, ready = run.state, run.ready
    which, validated = better(state.history[-1])
    accuracy = run.scores.test(run.networks[which], ready.student.subject)
    teacher = run.scores.test_teacher()
    if run.cache is not None:
        logger.info(
            "Teacher cache: of %d steps, the outputs of %d were there and of %d were computed.",
            run.cache.read_steps + run.cache.computed_steps, run.cache.read_steps, run.cache.computed_steps,
        )  # fmt: skip
    run.train.release()
    weights: dict[str, Mapping[str, Tensor]] = {outcome.STUDENT: copied_weights(run.networks[which])}
    run.network._compiled_call_impl = None
    best = _test_best(run, weights, which, accuracy)
    run.network.load_state_dict(weights[outcome.STUDENT])
    student = run.network.cpu().eval()
    if run.train.average is not None:
        _log_choice(which, validated)
    given = None if run.config.method.follows_student else ready.teacher
    result = run.scores.outcome(accuracy) | outcome.result(teacher, ready.student.subject, given, run.world) | {
        "images": ready.parts.counts, "weights": which, "validation_top1": validated, "teacher_guard": state.guard,
        "epochs": state.epoch, "best": best, "seconds": round(state.seconds, 1),
        "probe_seconds": round(state.probe_seconds, 1), **broken_record(ready.parts.broken),
    }  # fmt: skip
    if run.world.writes:
        _write(run, result, weights)
    return Distilled(student, accuracy, teacher, state.history, result, run.folder.path, run.world.writes)


def _compare(run: Run) -> None:
    try:
        comparisons.write(run, "after", comparisons.measure(run))
        comparisons.measure_further(run)
    except CkaProbeError as error:  # the student is trained, and is worth more than this picture of it
        logger.warning("The comparison after the training is left out: %s", error)


def _picture_words(run: Run) -> None:
    """Write words.npz, if the method has visual words."""
    ready = run.ready
    if ready.teacher is None or not run.world.writes:
        return
    try:
        words = run.train.learner.loss.pictured(ready.teacher.subject, ready.parts.probed)
    except CkaProbeError as error:
        logger.warning("The picture of the visual words is left out: %s", error)
        return
    if words is not None:
        run.folder.put(WORDS, lambda path: save_words(words, path))


def _test_best(
    run: Run, weights: dict[str, Mapping[str, Tensor]], which: str, tested: Accuracy
) -> dict[str, Any] | None:
    """Test the best weights, and add them to those that are exported; None if there are no validation images.

    Args:
        run: that has ended.
        weights: to export; the best ones are added.
        which: of the last epoch's weights are exported, `LAST` or `AVERAGE`.
        tested: the accuracy of these, which are not tested again where they are the best ones.
    """
    best = run.state.best
    if best is None:
        return None
    state = weights[outcome.BEST] = run.world.from_first(dict(best.state))
    accuracy = tested
    if (best.epoch, best.weights) != (run.state.epoch, which):
        run.network.load_state_dict(state)
        accuracy = run.scores.test(run.network, run.ready.student.subject)
    return {
        "file": outcome.BEST, "epoch": best.epoch, "weights": best.weights, "validation_top1": best.top1,
        "top1": accuracy.top1,
    }  # fmt: skip


def _log_choice(which: str, validated: float | None) -> None:
    logger.info(
        "Of the last weights and their average, %s kept%s.",
        {LAST: "the last weights are", AVERAGE: "the average is"}[which],
        ": no worse on the validation images" if validated is not None else "; there are no validation images",
    )


def _write(run: Run, result: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    if run.ready.parts.broken:
        logger.warning("%s. They were left out or replaced: see run.yaml.", describe_broken(run.ready.parts.broken))
    record = {"command": run.state.command, "options": as_record(run.config), "result": result}
    outcome.write_outcome(run.folder, record, weights, run.model_config)
