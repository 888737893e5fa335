"""What the measurement says to the training: similarity of student and teacher, and the stages chosen by it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.distill.branches import exit_branch
from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.methods.loss import Scored, Setting, Side
from cka_probe.distill.stages import choose_stages, match_layers, parse_stages, score_stages
from cka_probe.distill.subjects import Examined, named_apart, parameters
from cka_probe.distill.training.learner import explaining_batch_norm
from cka_probe.errors import SpecError
from cka_probe.images.parts import FEW
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject
from cka_probe.probing.compare import compare
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.ranges import MIN_EXAMPLES

if TYPE_CHECKING:
    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.stage_choice import StageChoice

logger = logging.getLogger(__name__)

_TIMED_ROUNDS = 3

LEAST_TO_CHOOSE = 2 * MIN_EXAMPLES
"""Images below which ``auto`` is refused: two batches, without which there are no standard errors."""


@dataclass(frozen=True)
class Decision:
    """The stages that training goes on with.

    Attributes:
        stages: their numbers, from 1.
        matches: a layer of the teacher for each.
        record: for stages.yaml: scores, reasons, costs.
    """

    stages: tuple[int, ...]
    matches: tuple[str, ...]
    record: dict[str, Any]


def measure(
    student: Examined, teacher: Examined, images: ImageSource, config: Training, device: torch.device
) -> Similarity | None:
    """CKA of the student's stages and the teacher's blocks, debiased, as `compare` computes it.

    Args:
        student: its stages are the rows.
        teacher: its blocks and stages are the columns.
        images: `cka_probe.images.parts.Parts.probed`.
        config: how many of them.
        device: where the networks are.

    None where one of the two has no layers that can be observed.

    Raises:
        FeatureError: activations are not finite.
    """
    if not (student.side.stages and teacher.side.blocks):
        return None
    layers = [*_stages_of(student), *_blocks_and_stages(teacher.side)]
    return _compared(list(named_apart(student.subject, teacher.subject)), layers, images, config, device)


def measure_further(  # noqa: PLR0913  # as `measure`
    name: str,
    scored: Scored,
    student: Examined,
    teacher: Examined,
    *,
    images: ImageSource,
    config: Training,
    device: torch.device,
) -> Similarity:
    """CKA of a further network of the method with the stages of student and teacher, as `measure` computes it.

    Args:
        name: of the network.
        scored: itself.
        student: its stages.
        teacher: its stages.
        images: as for `measure`.
        config: how many of them.
        device: where the networks are.
    """
    own, other = named_apart(student.subject, teacher.subject)
    sees = own if scored.sees == "student" else other
    subjects = [own, replace(sees, name=name, network=scored.network), other]
    return _compared(subjects, [*_stages_of(student), *scored.layers, *_stages_of(teacher)], images, config, device)


def _blocks_and_stages(side: Side) -> list[str]:
    """Names of blocks and stages, without a last block whose very output its stage returns: layer1.1 of layer1."""
    traced, stages = list(side.layers.values()), [stage.name for stage in side.stages]
    same = set()
    for stage in side.stages:
        index = traced.index(stage)
        while traced[index].alias and traced[index - 1].name.startswith(f"{stage.name}."):
            index -= 1
            same.add(traced[index].name)
    return [*(block for block in side.blocks if block not in same), *stages]


def _stages_of(examined: Examined) -> list[str]:
    return [stage.name for stage in examined.side.stages]


def _compared(
    subjects: list[Subject], layers: list[str], images: ImageSource, config: Training, device: torch.device
) -> Similarity:
    examples, batch = measured(images, config)
    return compare(
        subjects,
        data=images,
        layers=list(dict.fromkeys(layers)),
        examples=examples,
        batch_size=batch,
        device=str(device),
        seed=config.seed,
        workers=0 if images.in_memory else config.workers,
    )


def measured(images: ImageSource, config: Training) -> tuple[int, int]:
    """How many images are compared, and in batches of how many: whole ones, and several for the standard errors."""
    examples = min(config.probe_examples, len(images))
    batch = max(min(128, examples // 4), MIN_EXAMPLES)
    return examples - examples % batch, batch


def check_enough(images: ImageSource, config: Training) -> None:
    """Raise a SpecError where ``auto`` would decide by so few images that there are no standard errors."""
    examples, _ = measured(images, config)
    if examples < LEAST_TO_CHOOSE:
        raise SpecError(
            f"{_auto(config)} must compare student and teacher on {LEAST_TO_CHOOSE} images or more, better on {FEW}, "
            f"but {images.name} holds {len(images)} and --probe-examples is {config.probe_examples}. Use more images, "
            "or choose the stages yourself."
        )


def warn_if_few(similarity: Similarity, images: ImageSource, config: Training) -> None:
    """Say by the shuffled control how far chance reaches, where ``auto`` decides by few images."""
    examples, batch = measured(images, config)
    if examples < FEW:
        chance = float(np.nanmax(np.abs(similarity.null)))
        logger.warning(
            "%s compares student and teacher on %d images, in batches of %d. Shuffled images, which share nothing, "
            "reach a CKA of %.3f there (control), so that chance may choose the stages. Use %d images or more "
            "(--probe-examples, --validation), or name the stages.", _auto(config), examples, batch, chance, FEW,
        )  # fmt: skip


def decide(  # noqa: PLR0913
    student: Examined,
    teacher: Examined,
    method: StageChoice,
    similarity: Similarity | None,
    *,
    classes: int,
    batch_size: int,
) -> Decision:
    """The stages that ``--stages`` names, or those that the rule chooses from a similarity.

    Args:
        student: its stages.
        teacher: its layers.
        method: names the stages, or the rule.
        similarity: of layers of the student with those of the teacher; needed for ``auto``.
        classes: of the logits.
        batch_size: for which the costs of branches are measured.
    """
    names = [stage.name for stage in student.side.stages]
    counts, milliseconds = _branch_costs(student, teacher, classes, batch_size)
    stages = parse_stages(method.stages, len(names))
    block = None
    if similarity is not None:
        block = similarity.between(*names_in(similarity, student, teacher))
    if stages is None:
        assert block is not None, "auto decides from a similarity"
        choice = choose_stages(
            score_stages(block, names, counts), method.rule, count=method.branches, budget=method.branch_budget
        )
        stages, record = choice.stages, choice.record()
    else:
        rows = [
            {"stage": number, "layer": name, "parameters": count, "chosen": number in stages, "reason": "as asked for"}
            for number, (name, count) in enumerate(zip(names, counts, strict=True), 1)
        ]
        record = {"rule": f"--stages {method.stages}", "chosen": list(stages), "stages": rows}
    for row, cost in zip(record["stages"], milliseconds, strict=True):
        row["milliseconds_a_step"] = cost
    chosen = [names[stage - 1] for stage in stages]
    own = [stage.name for stage in teacher.side.stages]
    if method.stages == "auto" and block is not None and method.matches:
        matches = match_layers(block, chosen, _with_positions(block, teacher))
    else:  # the stage at the same place; where there are fewer, at the same share of the depth
        matches = [own[max(round(stage * len(own) / len(names)), 1) - 1] for stage in stages] if own else []
    record["parameters"] = {
        "student": parameters(student.subject.network),
        "all_branches": sum(counts),
        "chosen_branches": sum(counts[stage - 1] for stage in stages),
    }
    if method.matches:
        record["pairs"] = [list(pair) for pair in zip(chosen, matches, strict=True)]
    measure = "CKA" if block is None or block.measure == "cka" else block.measure
    logger.info("%s", method.in_words(record, measure))
    return Decision(stages, tuple(matches), record)


def finished_comparison(path: str) -> Similarity:
    """The similarity of a finished comparison: a folder with similarity.npz, or such a file."""
    place = Path(path)
    return Similarity.load(place / "similarity.npz" if place.is_dir() else place)


def _auto(config: Training) -> str:
    assert isinstance(config.method, ByComparison)
    return f"{config.method.decider} auto"


def setting_with(setting: Setting, decision: Decision | None) -> Setting:
    """The setting of a method once the stages are known."""
    if decision is None:
        return setting
    return replace(setting, chosen=decision.stages, matches=decision.matches)


def _with_positions(block: Similarity, teacher: Examined) -> list[int]:
    """The columns of a similarity that are layers of the teacher which put out maps or tokens.

    Raises:
        SpecError: there is none, or a column is no layer of the teacher.
    """
    names, side = [column.name for column in block.cols], teacher.side
    unknown = [name for name in names if name not in side.layers]
    if unknown:
        raise SpecError(f"The similarity names {unknown[0]!r}, which is no layer of {side.name!r}.")
    found = [index for index, name in enumerate(names) if StageShape.of(side.layers[name], side.image_size)]
    if not found:
        raise SpecError(
            f"The similarity must hold a layer of {side.name!r} that puts out a map or tokens, but holds "
            f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}. Compare with --layers stages or blocks."
        )
    return found


def names_in(similarity: Similarity, student: Examined, teacher: Examined) -> tuple[str, str]:
    """The names that the two have in a similarity: their own, or those of a comparison of just two networks."""
    own, other = named_apart(student.subject, teacher.subject)
    models = similarity.models
    if own.name in models and other.name in models:
        return own.name, other.name
    raise SpecError(
        f"The similarity must hold {own.name!r} and {other.name!r}, but holds {', '.join(map(repr, models))}. "
        "Compare the two specs as they are given here, or name them alike (name=SPEC)."
    )


def _branch_costs(student: Examined, teacher: Examined, classes: int, batch_size: int) -> tuple[list[int], list[float]]:
    """For each stage's branch, its parameters, and milliseconds of a forward and backward pass on noise."""
    counts, milliseconds = [], []
    shapes = student.side.shapes
    device = next(student.subject.network.parameters()).device
    with torch.random.fork_rng():
        for number, (shape, stage) in enumerate(zip(shapes, student.side.stages, strict=True), 1):
            branch = exit_branch(
                shape,
                len(shapes) - number,
                student_width=student.side.width,
                teacher_width=teacher.side.width,
                classes=classes,
            ).to(device)
            counts.append(parameters(branch))
            milliseconds.append(_milliseconds(branch, shape, stage.shape, batch_size, device))
    return counts, milliseconds


def _milliseconds(
    branch: nn.Module, shape: StageShape, size: tuple[int, ...], batch: int, device: torch.device
) -> float:
    activation = torch.randn(batch, *size, device=device, requires_grad=True)
    times = []
    for _ in range(_TIMED_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        with explaining_batch_norm(batch):
            branch(activation).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return round(1000 * min(times), 3)
