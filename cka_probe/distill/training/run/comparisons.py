"""The comparisons of student and teacher that a run makes, and the stages chosen by them."""

from __future__ import annotations

import logging
import time

from cka_probe.distill import probe
from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.outputs import outcome
from cka_probe.distill.training.run.run import Run
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.ranges import MIN_EXAMPLES

logger = logging.getLogger(__name__)


def by_comparison(run: Run) -> ByComparison | None:
    """The method, if it takes part at stages of the student."""
    return run.config.method if isinstance(run.config.method, ByComparison) else None


def is_undecided(run: Run) -> bool:
    """Whether the stages are still to be chosen."""
    return by_comparison(run) is not None and run.state.decision is None


def measure(run: Run) -> Similarity | None:
    """The similarity of the student and the network that it is compared with, which mostly is the teacher.

    None without one or enough images, and on all processes but one.
    """
    ready = run.ready
    if ready.compared is None or not run.world.writes:
        return None
    images = ready.parts.probed
    if len(images) < MIN_EXAMPLES:
        logger.info("The student is not compared: %s has %d images.", images.name, len(images))
        return None
    started = time.perf_counter()
    similarity = probe.measure(ready.student, ready.compared, images, run.config, run.world.device)
    run.state.probe_seconds += time.perf_counter() - started
    return similarity


def measure_further(run: Run) -> None:
    """Write the similarities of the method's further networks with student and teacher, as `measure` computes them."""
    ready = run.ready
    images = ready.parts.probed
    if ready.teacher is None or not run.world.writes or len(images) < MIN_EXAMPLES:
        return
    started = time.perf_counter()
    for name, scored in run.train.learner.loss.scored.items():
        similarity = probe.measure_further(
            name, scored, ready.student, ready.teacher, images=images, config=run.config, device=run.world.device
        )
        write(run, name, similarity)
    run.state.probe_seconds += time.perf_counter() - started


def write(run: Run, when: str, similarity: Similarity | None) -> None:
    """Write similarity.WHEN.npz, if there is a similarity."""
    if similarity is not None:
        outcome.write_similarity(run.folder, when, similarity)


def decide(run: Run, similarity: Similarity | None) -> None:
    """Choose the stages that take part, on all processes alike.

    Args:
        run: whose state receives the decision.
        similarity: of student and teacher, if the method decides by it; None on all processes but the one that writes.
    """
    ready, method = run.ready, by_comparison(run)
    assert ready.teacher is not None
    assert method is not None
    decision = None
    if run.world.writes:
        decision = method.decide(ready.student, ready.teacher, run.config, similarity, ready.setting.classes)
        if method.measures_stages:
            decision.record["part"] = "training" if ready.parts.probed is ready.parts.train else "validation"
    run.state.decision = run.world.from_first(decision)


def choose_stages(run: Run) -> None:
    """Measure, choose the stages by the measurement, and build the method for them."""
    similarity = measure(run)
    write(run, "choice", similarity)
    decide(run, similarity)
    if run.state.decision is not None and run.world.writes:
        outcome.write_stages(run.folder, run.state.decision.record)
    run.train.equip(run.state.decision)
