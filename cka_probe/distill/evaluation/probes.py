"""Classes from frozen features: by nearest neighbours, by a linear classifier, and in few-shot episodes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.distill.evaluation.frozen_features import Features
from cka_probe.errors import DataError

NEIGHBOURS = 20


def nearest_neighbours(known: Features, asked: Features, neighbours: int = NEIGHBOURS) -> NDArray[np.int64]:
    """The majority class of the nearest known images by cosine similarity, (n,): scikit-learn's kNN.

    Args:
        known: of the images whose classes are used.
        asked: of the images to name.
        neighbours: how many vote; all of the known images, where these are fewer.
    """
    from sklearn.neighbors import KNeighborsClassifier

    voting = KNeighborsClassifier(min(neighbours, len(known.values)))
    voting.fit(_normalized(known.values), known.labels)
    predicted: NDArray[np.int64] = voting.predict(_normalized(asked.values))
    return predicted


def linear_probe(known: Features, asked: Features) -> NDArray[np.int64]:
    """The classes (n,) by logistic regression on standardised features, trained on the known images.

    Args:
        known: of the images whose classes are used.
        asked: of the images to name.

    Raises:
        DataError: the known images are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(known.labels)) < 2:
        raise DataError("A linear probe needs training images of 2 classes or more, but they are all of one class.")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(known.values, known.labels)
    predicted: NDArray[np.int64] = probe.predict(asked.values)
    return predicted


class Episodes(NamedTuple):
    """The queries of all episodes.

    Attributes:
        labels: (episodes, ways), one query a class.
        predicted: the same.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]

    @property
    def accuracies(self) -> NDArray[np.float64]:
        """Of each episode, (episodes,)."""
        shares: NDArray[np.float64] = (self.labels == self.predicted).mean(1)
        return shares


def few_shot(features: Features, *, ways: int, shots: int, episodes: int, seed: int) -> Episodes:
    """Episodes of OBoW's evaluation: a query of each class goes to the nearest mean of some other images of a class.

    The mean is of L2-normalised features, and the nearest is that with the largest cosine similarity.

    Args:
        features: of the images that episodes draw from.
        ways: classes of an episode; all, where there are fewer.
        shots: images a class that make the mean.
        episodes: how many.
        seed: of the draws.

    Raises:
        DataError: fewer than two classes have one image more than ``shots``.
    """
    values = _normalized(features.values)
    classes, counts = np.unique(features.labels, return_counts=True)
    classes = classes[counts > shots]
    if len(classes) < 2:
        raise DataError(
            f"Episodes of {shots} shots need 2 classes or more with {shots + 1} images each, but {len(classes)} have "
            "as many. Use fewer --shots, or more images."
        )
    members = {label: np.flatnonzero(features.labels == label) for label in classes.tolist()}
    generator = np.random.default_rng(seed)
    labels, predicted = [], []
    for _ in range(episodes):
        chosen = generator.choice(classes, min(ways, len(classes)), replace=False)
        drawn = np.stack([generator.choice(members[int(label)], shots + 1, replace=False) for label in chosen])
        prototypes = _normalized(values[drawn[:, 1:]].mean(1))
        labels.append(chosen)
        predicted.append(chosen[(values[drawn[:, 0]] @ prototypes.T).argmax(1)])
    return Episodes(np.array(labels), np.array(predicted))


def _normalized(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows of norm 1; a row of zeros stays one."""
    rows: NDArray[np.float64] = values.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
