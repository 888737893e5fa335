"""``evaluate --by knn``, ``linear`` and ``fewshot``: how well a network's frozen features tell classes apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import nan

import numpy as np
from numpy.typing import NDArray

from cka_probe.distill.evaluation.frozen_features import Features, feature_layer, features_of
from cka_probe.distill.evaluation.images import EvaluatedImages
from cka_probe.distill.evaluation.probes import few_shot, linear_probe, nearest_neighbours
from cka_probe.distill.evaluation.score import Accuracy, Score
from cka_probe.distill.options import Evaluation
from cka_probe.distill.subjects import examine
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World


def scored_by_features(
    subjects: Sequence[Subject],
    chosen: EvaluatedImages,
    options: Evaluation,
    world: World,
    done: Callable[[Score], None] | None = None,
) -> list[Score]:
    """Score networks by their features on the same images.

    Args:
        subjects: the networks.
        chosen: the images, and those for training.
        options: that are checked.
        world: the processes that share the images.
        done: called on the process that writes, once a network is done.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change.
    """
    scores = []
    for subject in subjects:
        side = examine(subject, "stages", world.device).side
        layer = feature_layer(side)
        asked = features_of(subject, layer, chosen.images, world, options)
        known = None
        if chosen.train is not None and options.by != "fewshot":
            known = features_of(subject, layer, chosen.train, world, options)
        accuracy, labels, predicted = _named(known, asked, options)
        how = f"by {_in_words(known, options)} ({layer.name or 'output'}, {asked.values.shape[1]} features)"
        scores.append(
            Score(
                subject.name, accuracy, labels, predicted, chosen.classes, how, chosen, subject.preprocessing,
                subject.source, options.by,
            )
        )  # fmt: skip
        if done is not None and world.writes:
            done(scores[-1])
    return scores


def _named(
    known: Features | None, asked: Features, options: Evaluation
) -> tuple[Accuracy, NDArray[np.int64], NDArray[np.int64]]:
    """The accuracy, and of each image, or each query of an episode, the class and the one that it is taken for."""
    if options.by == "fewshot":
        found = few_shot(
            asked, ways=options.ways, shots=options.shots, episodes=options.episodes, seed=options.seed
        )  # fmt: skip
        shares = tuple(found.accuracies.tolist())
        accuracy = Accuracy(found.labels.size, float(np.mean(shares)), nan, shares)
        return accuracy, found.labels.ravel(), found.predicted.ravel()
    assert known is not None, "a training part was asked for"
    if options.by == "knn":
        predicted = nearest_neighbours(known, asked, options.neighbours)
    else:
        predicted = linear_probe(known, asked)
    return Accuracy(len(predicted), float((predicted == asked.labels).mean()), nan), asked.labels, predicted


def _in_words(known: Features | None, options: Evaluation) -> str:
    if options.by == "fewshot":
        return f"{options.episodes} episodes of {options.shots} shots"
    count = len(known.values) if known is not None else 0
    how = f"{options.neighbours} nearest neighbours among" if options.by == "knn" else "logistic regression on"
    return f"{how} {count:,} training images"
