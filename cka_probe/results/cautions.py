"""Similarity -> what a referee would object to, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cka_probe.estimation.collected import LEAST_EXAMPLES
from cka_probe.measures.catalogue import about, label
from cka_probe.results.findings import control_band, model_pairs, off_diagonal
from cka_probe.results.provenance import Duplicates, Provenance
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.provenance import FROM_FACTORY

ADVISED_BATCH, ADVISED_BATCHES, ADVISED_EXAMPLES = 64, 4, 512
"""Below them the estimates scatter more than most differences that are read off a heatmap."""

MOST_CONTROL = 0.15
"""How far from 0 the shuffled control may reach, 95% of it, where it should be 0. On independent features of 1 to 1,000
dimensions, also heavy-tailed ones, it reaches 0.3 to 0.9 in 4 to 16 batches of 4 and 0.06 to 0.2 in 16 batches of 8; in
512 images in batches of 64 or more it stays below 0.05."""

_SHOWN = 6
_SHOWN_BROKEN = 3
_EQUAL = 1e-6
_EFFECTIVE = 0.8
"""Of the batches, how many must count for the sums to be those of all. Of normal features it is 0.85 or more.

A last batch that is shorter counts less; that is no reason for a warning, and is allowed for."""


def alarm(similarity: Similarity) -> str | None:
    """That the estimate is useless, as the shuffled control is far from 0 where it should be 0; else None."""
    if not about(similarity.measure).zero_by_chance or similarity.provenance.debiased is False:
        return None
    control = np.abs(off_diagonal(similarity, similarity.null))
    reach = float(np.quantile(control, 0.95)) if len(control) else 0.0
    if reach <= MOST_CONTROL:
        return None
    return (
        f"The shuffled control should be near 0, but lies up to {reach:.2f} from it: these values of "
        f"{label(similarity.measure)} say nothing. Use larger batches (--batch-size {ADVISED_BATCH} or more) "
        f"and more images (--examples {ADVISED_EXAMPLES} or more)."
    )


def cautions(similarity: Similarity) -> list[str]:
    """What a referee would object to, a sentence each; none where there is nothing."""
    provenance = similarity.provenance
    data, batch, batches = provenance.data, provenance.batch_size, provenance.batches or 0
    found = []
    if data is not None and data.examples < ADVISED_EXAMPLES:
        found.append(
            f"{data.examples:,} images are few: use {ADVISED_EXAMPLES} or more before you rely on a difference."
        )
    if data is not None and data.duplicates is not None and about(similarity.measure).paired:
        found.append(describe_duplicates(data.duplicates, data.examples))
    broken = () if data is None else data.broken
    if broken:
        shown = ", ".join(one.image for one in broken[:_SHOWN_BROKEN]) + (", …" if len(broken) > _SHOWN_BROKEN else "")
        found.append(f"{len(broken):,} of the images could not be read and are left out: {shown}. run.yaml lists all.")
    if batch is not None and batch < ADVISED_BATCH and provenance.blocks is None:
        found.append(f"Batches of {batch} are small: {ADVISED_BATCH} or more give a steadier estimate.")
    if batches == 1:
        found.append(
            "All images were one batch, so the values have no standard errors. A smaller batch size gives them."
        )
    elif 1 < batches < ADVISED_BATCHES:
        found.append(
            f"{batches} batches say little of how much batches differ: the standard errors are uncertain "
            f"themselves. {ADVISED_BATCHES} batches or more give better errors; intervals allow for it."
        )
    if provenance.debiased is False:
        found.append(_bias(provenance))
    if provenance.amp:
        found.append("The networks ran in bfloat16, so these are the features of slightly coarser networks.")
    if provenance.blocks == 0:
        found.append(f"The images are too few for standard errors: {LEAST_EXAMPLES} or more give them.")
    elif provenance.blocks is not None and (np.isnan(similarity.std_error) & np.isfinite(similarity.values)).any():
        found.append(
            "Some values have no standard error: without a tenth of the images they are undefined, or the same "
            "whichever images are left out."
        )
    if about(similarity.measure).kind == "distance":
        found.append(
            "A distance compares one layer under two views; between other layers it has no meaning, and no value. "
            "Where the two distributions are equal, its error is too large: there, see the p-value (--permutations)."
        )
        pairs = between_networks(similarity)
        if pairs:
            found.append(
                f"Different networks, so that a distance between their features says nothing: {_listed(pairs)}."
            )
    constant = [
        str(layer)
        for layer, value in zip(similarity.rows, _own(similarity, similarity.values, 0.0), strict=True)
        if np.isnan(value)
    ]
    if constant:
        found.append(f"Constant over the images, and therefore without a value: {_listed(constant)}.")
    few = few_batches(similarity)
    if few:
        found.append(few)
    same = [" = ".join(map(str, group)) for group in equal_layers(similarity)]
    if same:
        found.append(f"Equal by every value, so that the measure cannot distinguish them: {_listed(same, '; ')}.")
    found.extend(_noise(similarity))
    random = [s.name for s in provenance.subjects if str(s.weights).startswith("random")]
    if random:
        found.append(f"Random weights, not trained: {_listed(random)}.")
    own = [s.name for s in provenance.subjects if s.weights == FROM_FACTORY]
    if own:
        found.append(f"No checkpoint was named, so the weights are those that the factory sets: {_listed(own)}.")
    return found


def describe_duplicates(duplicates: Duplicates, examples: int) -> str:
    """How many images are copies, which, what that does to CKA, and what to do.

    Args:
        duplicates: the copies.
        examples: how many images there are.
    """
    count = duplicates.images
    what = (
        f"{count:,} of the {examples:,} images are exact copies"
        if count != 1
        else (f"1 of the {examples:,} images is an exact copy")
    )
    shown = "; ".join(f"{later} of {earlier}" for earlier, later in duplicates.pairs)
    return (
        f"{what} of another ({shown}). Duplicates raise debiased CKA between any two layers, as all layers find them "
        "alike. Remove the copies."
    )


def between_networks(similarity: Similarity) -> list[str]:
    """The pairs of different networks with a distance: layers of one name need not hold the same features there."""
    subjects = {subject.name: subject for subject in similarity.provenance.subjects}
    found = []
    for first, second in model_pairs(similarity):
        one, other = subjects.get(first), subjects.get(second)
        if one is None or other is None:
            continue
        networks = one.parameters is not None and other.parameters is not None
        views = one.model is not None and one.model == other.model
        if networks and not views and np.isfinite(similarity.between(first, second).values).any():
            found.append(f"{first} × {second}")
    return found


def few_batches(similarity: Similarity) -> str | None:
    """That a few batches dominate the sums of some layers, so that their errors are too small; else None."""
    count = similarity.provenance.batches
    if similarity.batches is None or not count or count < 2:
        return None
    effective = _own(similarity, similarity.batches, np.inf)
    heavy = np.flatnonzero(effective < _EFFECTIVE * _batches_by_size(similarity.provenance, count))
    if not len(heavy):
        return None
    layers = [str(similarity.rows[index]) for index in heavy]
    return (
        f"A few batches dominate the sums, since a few images have features much larger than the others': the {count} "
        f"batches count as {effective[heavy].min():.1f} in {_listed(layers)}. There, errors tend to be too small: "
        "nominal 95% intervals held the value in 88 to 94% of simulated samples."
    )


def _batches_by_size(provenance: Provenance, count: int) -> float:
    """How many equal batches there would be if only sizes mattered: (Σ n²)² / Σ n⁴, as HSIC sums grow with n²."""
    size, data = provenance.batch_size, provenance.data
    if size is None or data is None:
        return count
    last = min(data.examples - (count - 1) * size, size) / size
    return (count - 1 + last**2) ** 2 / (count - 1 + last**4)


def equal_layers(similarity: Similarity) -> list[list[Layer]]:
    """Layers that are 1 with each other, and as similar to every other layer, within 1e-6.

    Such are those before and after a dropout, which passes on what it gets.

    Args:
        similarity: a joint result; of any other, and of distances, none are known.
    """
    if similarity.rows != similarity.cols or about(similarity.measure).kind == "distance":
        return []
    groups: list[list[int]] = []
    for index, values in enumerate(similarity.values):
        for group in groups:
            first = group[0]
            one = abs(values[first] - 1) <= _EQUAL
            if one and np.allclose(values, similarity.values[first], rtol=0, atol=_EQUAL, equal_nan=True):
                group.append(index)
                break
        else:
            groups.append([index])
    return [[similarity.rows[index] for index in group] for group in groups if len(group) > 1]


def _noise(similarity: Similarity) -> list[str]:
    measured = about(similarity.measure)
    _, high = control_band(similarity)
    values = off_diagonal(similarity, similarity.values)
    # The noise of a distance lies above 0 as its values do: up to there, two views are as one.
    share = (values <= high).mean() if len(values) and np.isfinite(high) else 0.0
    if not share:
        return []
    control = "the shuffled control" if measured.paired else "images swapped between the views at random"
    return [f"{share:.1%} of the values lie within the noise floor ({control}, up to {high:.3f})."]


def _bias(provenance: Provenance) -> str:
    batch = provenance.batch_size
    widths = {
        f"{subject.name} {layer}": width for subject in provenance.subjects for layer, width in subject.features.items()
    }
    wide = [layer for layer, width in widths.items() if batch is not None and width > batch]
    text = "The biased estimator raises every value"
    if wide:
        text += (
            f", most where there are more features than images in a batch, as in {len(wide)} of {len(widths)} layers"
        )
    return f"{text}: the shuffled control is that bias, not 0."


def _own(similarity: Similarity, matrix: NDArray[np.float64], elsewhere: float) -> NDArray[np.float64]:
    """Of each row, the entry of the layer with itself; ``elsewhere`` where that is not among the columns."""
    column = {layer: index for index, layer in enumerate(similarity.cols)}
    return np.array(
        [matrix[row, column[layer]] if layer in column else elsewhere for row, layer in enumerate(similarity.rows)]
    )


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more
