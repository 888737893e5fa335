"""The tables and figures of ``reports/stage-choice/README.md``, from the runs that are done.

    python -m benchmarks.stage_page [runs.csv]

prints the tables as Markdown and draws effects.png and rules.png beside the file of the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from benchmarks.stage_effects import (
    ALL,
    ALL_SHARED,
    LEAST,
    OUT,
    PAIRS,
    RIVALS,
    RULES,
    RUNS,
    WEIGHT,
    Arm,
    Pair,
    chosen,
    double_centred,
    gains,
    interval,
    mean_interval,
    p_value,
    pairs_of,
    relation,
    reliability,
    rows_of,
)


def main(arguments: Sequence[str]) -> None:
    table = Path(arguments[0]) if arguments else OUT / "runs.csv"
    rows = rows_of(table)
    pairs = pairs_of(rows)
    if not pairs:
        sys.exit(f"No pair has all of its {len(RUNS)} arms yet; {table} holds {len(rows)} runs.")
    tables = (accuracies(pairs), question_1(pairs), question_2(pairs))
    print("\n\n".join("\n".join(lines) for lines in tables))
    draw(pairs, table.parent)


def accuracies(pairs: Sequence[Pair]) -> list[str]:
    """Top-1 of the test images, the mean over seeds: teacher, student, and what the branches add. Lines of Markdown."""
    lines = ["| student | teacher | seeds | teacher | student alone | no branch | two (mean of six pairs) | four |"]
    lines.append("|---|---|" + "---:|" * 6)
    for pair in pairs:
        means = [
            float(np.mean([pair.top1(seed, arm) for seed in pair.runs for arm in arms]))
            for arms in ([Arm((), WEIGHT)], [Arm(stages, WEIGHT) for stages in PAIRS], [ALL_SHARED])
        ]
        cells = " | ".join(f"{value:.1f}" for value in (pair.teachers, pair.alone, *means))
        lines.append(f"| {pair.student} | {pair.teacher} | {len(pair.runs)} | {cells} |")
    return lines


def question_1(pairs: Sequence[Pair]) -> list[str]:
    """Is a branch worth more at the stages that are more, or less, similar to the teacher? Lines of Markdown."""
    effects = np.array([np.mean([pair.effects(seed) for seed in pair.runs], 0) for pair in pairs])
    scores = np.array([np.mean([pair.scores(seed) for seed in pair.runs], 0) for pair in pairs])
    lines = ["| student | teacher | seeds | effect of a branch at stage 1 | 2 | 3 | 4 | CKA at stage 1 | 2 | 3 | 4 |"]
    lines.append("|---|---|" + "---:|" * 9)
    for pair, effect, score in zip(pairs, effects, scores, strict=True):
        cells = [*(f"{value:+.2f}" for value in effect), *(f"{value:.3f}" for value in score)]
        lines.append(f"| {pair.student} | {pair.teacher} | {len(pair.runs)} | {' | '.join(cells)} |")
    lines.append(f"| mean | | | {' | '.join(f'{value:+.2f}' for value in effects.mean(0))} | | | | |")
    students, teachers = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
    crossed = len(pairs) == len(set(students)) * len(set(teachers))
    lines += ["", f"Relation of effects and ranks of CKA, double-centred: {relation(effects, scores):+.2f}"]
    if len(set(students)) >= 3:
        low, high = interval(effects, scores, students)
        lines[-1] += f" (95% interval {low:+.2f} to {high:+.2f}, jackknife over students)"
    if len(set(students)) >= 3 and crossed:
        lines[-1] += (
            f", p {p_value(effects, scores, students, teachers):.2f} ({_orders(students)} orders of the students)"
        )
    plain = np.mean([np.corrcoef(effect, rankdata(score))[0, 1] for effect, score in zip(effects, scores, strict=True)])
    lines.append(f"Mean correlation within a pair, which depth decides too: {plain:+.2f}")
    last = [chosen(LEAST, pair.scores(seed)).stages == ALL[-2:] for pair in pairs for seed in pair.runs]
    lines.append(f"The two stages with the least CKA are the last two in {sum(last)} of {len(last)} pairs and seeds.")
    seeds = min(len(pair.runs) for pair in pairs)
    if seeds > 1:
        by_seed = np.array([[pair.effects(list(pair.runs)[number]) for pair in pairs] for number in range(seeds)])
        lines.append(f"Reliability of the effects (between seeds, double-centred): {reliability(by_seed):.2f}")
    return lines


def question_2(pairs: Sequence[Pair]) -> list[str]:
    """How good is each rule's pick? Lines of Markdown."""
    lines = [
        "| stages with a branch | top-1 minus the mean of the six pairs | parameters of the branches | ms a step |"
    ]
    lines.append("|---|---:|---:|---:|")
    for rule in RULES:
        mean, low, high = mean_interval(list(gains(pairs, rule).values()))
        rows = [pair.runs[seed][chosen(rule, pair.scores(seed))] for pair in pairs for seed in pair.runs]
        size, spent = (
            np.mean([float(row[f"branch_{what}"]) for row in rows]) for what in ("parameters", "milliseconds")
        )
        lines.append(f"| {rule} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) | {size / 1000:,.0f} k | {spent:.0f} |")
    spread = [
        np.ptp([pair.top1(seed, Arm(stages, WEIGHT)) for stages in PAIRS]) for pair in pairs for seed in pair.runs
    ]
    lines += ["", "| difference | points of top-1 |", "|---|---:|"]
    for rule, rival in RIVALS:
        mean, low, high = mean_interval(list(gains(pairs, rule, rival).values()))
        lines.append(f"| {rule} − {rival} | {mean:+.2f} ({low:+.2f} to {high:+.2f}) |")
    lines += ["", f"The best of the six pairs of stages is above the worst by {np.mean(spread):.2f} points on average."]
    return lines


def draw(pairs: Sequence[Pair], out: Path) -> None:
    """The two figures of the page: effects against scores, and the gain of each rule."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    students = list(dict.fromkeys(pair.student for pair in pairs))
    colors = dict(zip(students, plt.get_cmap("tab10").colors, strict=False))
    effects = np.array([np.mean([pair.effects(seed) for seed in pair.runs], 0) for pair in pairs])
    scores = np.array([np.mean([pair.scores(seed) for seed in pair.runs], 0) for pair in pairs])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    views = ((scores, effects), (double_centred(rankdata(scores, axis=1)), double_centred(effects)))
    for axis, (x, y) in zip(axes, views, strict=True):
        for row, pair in enumerate(pairs):
            for stage in ALL:
                axis.scatter(
                    x[row, stage - 1], y[row, stage - 1], color=colors[pair.student], marker=f"${stage}$", s=50
                )
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes[0].set(xlabel="CKA of the stage with the teacher", ylabel="effect of a branch (points of top-1)")
    axes[0].set_title("As measured; a digit is the stage")
    axes[1].set(xlabel="rank of CKA, double-centred", ylabel="effect, double-centred (points)")
    axes[1].set_title(f"Without what pair and depth explain (r = {relation(effects, scores):+.2f})")
    handles = [plt.Line2D([], [], color=color, marker="o", linestyle="") for color in colors.values()]
    axes[1].legend(handles, students, fontsize="small")
    figure.savefig(out / "effects.png", dpi=120)
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for row, rule in enumerate(reversed(RULES)):
        found = gains(pairs, rule)
        mean, low, high = mean_interval(list(found.values()))
        if np.isfinite(low):
            axis.plot([low, high], [row, row], color="0.4", linewidth=2, zorder=1)
        axis.scatter([mean], [row], color="black", s=40, zorder=3)
        for student, gain in found.items():
            label = student if row == 0 else None
            axis.scatter([gain], [row + 0.22], color=colors[student], s=14, zorder=2, label=label)
    axis.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(RULES)), list(reversed(RULES)))
    axis.set_xlabel("top-1 minus the mean of the six pairs of stages (points)")
    axis.set_title("Black: mean and 95% interval over students", fontsize="medium")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "rules.png", dpi=120)
    plt.close(figure)


def _orders(students: Sequence[str]) -> int:
    return len(list(permutations(set(students))))


if __name__ == "__main__":
    main(sys.argv[1:])
