"""What an evaluation prints."""

from __future__ import annotations

from collections.abc import Sequence

from cka_probe.distill.evaluation.files import lowest
from cka_probe.distill.evaluation.score import Score
from cka_probe.images.broken import describe_broken
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.specs import ModelSpec
from cka_probe.runtime.terminal import print_result, visible


class Table:
    """Prints what was measured, and a row a network as soon as it is done; of a single network, a line a value.

    Args:
        specs: of all networks.
        per_class: print the classes with the lowest accuracies too.
    """

    def __init__(self, specs: Sequence[str], *, per_class: bool) -> None:
        self._names = [visible(ModelSpec.parse(spec).name) for spec in specs]
        self._per_class = per_class
        self._scores: list[Score] = []

    def add(self, score: Score) -> None:
        """Print a network's row."""
        if not self._scores:
            measured = score.images
            part = measured.part if " " in measured.part else f"part {measured.part}"
            print_result(f"Data {visible(measured.images.name)} ({visible(part)})")
        self._scores.append(score)
        if len(self._names) == 1:
            self._single(score)
        else:
            self._row(score)
        if len(self._scores) == len(self._names):
            self._end(score)

    def _single(self, score: Score) -> None:
        low, high = score.accuracy.interval()
        print_result(f"Input {seen(score.sees)}")
        print_result(f"Classes {len(score.classes)}, {score.how}")
        print_result(f"{'Queries' if score.by == 'fewshot' else 'Images'} {score.accuracy.images}")
        print_result(f"Top-1 {score.top1:.2%} (95% interval {low:.2%} to {high:.2%})")
        if score.has_top5:
            print_result(f"Top-5 {score.top5:.2%}")

    def _row(self, score: Score) -> None:
        width = max(map(len, [*self._names, "Network"]))
        if len(self._scores) == 1:
            top5 = f"  {'Top-5':>7}" if score.has_top5 else ""
            print_result(f"{'Network':{width}}  {'Top-1':>7}  {'95% interval':>18}{top5}  {'Images':>7}")
        low, high = score.accuracy.interval()
        top5 = f"  {score.top5:>7.2%}" if score.has_top5 else ""
        interval = f"{low:.2%} to {high:.2%}"
        print_result(
            f"{visible(score.name):{width}}  {score.top1:>7.2%}  {interval:>18}{top5}  {score.accuracy.images:>7}"
        )

    def _end(self, score: Score) -> None:
        if len(self._names) > 1:
            same: dict[str, list[str]] = {}
            for one in self._scores:
                how = f"input {seen(one.sees)}; {len(one.classes)} classes, {one.how}"
                same.setdefault(how, []).append(visible(one.name))
            for how, names in same.items():
                print_result(f"{', '.join(names)}: {how}")
        for one in self._scores if self._per_class else ():
            _print_lowest(one)
        if score.images.broken:
            print_result(f"Broken {visible(describe_broken(score.images.broken))}. Left out.")


def seen(preprocessing: Preprocessing) -> str:
    """How a network sees an image, for a reader.

    >>> seen(Preprocessing(size=(1, 28, 28), mean=(0.5,), std=(0.5,)))
    '28 × 28 px, gray, bicubic, center crop 0.875, mean 0.5, std 0.5'
    """
    channels, height, width = preprocessing.size
    colour = {1: "gray", 3: "RGB"}.get(channels, f"{channels} channels")
    mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return (
        f"{height} × {width} px, {colour}, {preprocessing.interpolation}, {preprocessing.crop_mode} crop "
        f"{preprocessing.crop_pct:g}, mean {mean}, std {std}"
    )


def _print_lowest(score: Score) -> None:
    rows = lowest(score)
    if rows:
        print_result(f"Lowest classes of {visible(score.name)}:")
    for row in rows:
        most = f"; {row['mistaken']} as {visible(row['mistaken_for'])}" if row["mistaken"] else ""
        print_result(f"  {visible(row['class'])}: {row['accuracy']:.2%} ({row['right']} of {row['images']}{most})")
