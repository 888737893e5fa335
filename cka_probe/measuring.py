"""The measures of a run: started together on the layers, and turned into results at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import SpecError
from cka_probe.findings import alarm, between_networks, model_pairs
from cka_probe.kernels import MedianRule
from cka_probe.measures import MEASURES, Measure, mantel
from cka_probe.measures.collected import Collected
from cka_probe.measures.estimates import Asked, Estimates
from cka_probe.measures.rdms import Comparison, Rdm
from cka_probe.measures.storage import BUDGET_BYTES, FeatureStore, Scratch
from cka_probe.quantities import quantity
from cka_probe.similarity import Curve, Influence, Layer, Similarity

logger = logging.getLogger(__name__)

CURVE_POINTS = 6
_LEAST_POINT = 16


def start_measures(
    names: Sequence[str],
    layers: Sequence[Layer],
    examples: int,
    *,
    seed: int,
    debiased: bool,
    threshold: float,
    median: MedianRule,
    rdm: Rdm,
    rdm_comparison: Comparison,
    neighbours: int,
    permutations: int,
    curve: bool,
    influence: int,
    cache: str | Path | None,
    in_files: bool = False,
) -> dict[str, Measure]:
    """The measures by name, ready for the first batch. Those that need all examples share one store of features.

    Args:
        names: of the measures.
        layers: of all subjects, one after the other.
        examples: how many there will be.
        seed: as for `cka_probe.compare`; so are the others.
        debiased: of CKA.
        threshold: of the RBF kernel.
        median: of the RBF kernel.
        rdm: of RSA and Mantel.
        rdm_comparison: of RSA.
        neighbours: of mutual k-nearest neighbours.
        permutations: of the permutation tests.
        curve: whether to evaluate at growing numbers of examples.
        influence: how many influential examples are wanted.
        cache: where features go that do not fit into memory.
        in_files: all of them go there.
    """
    labels = [f"layer {layer.name!r} of {layer.model!r}" for layer in layers]
    models = list(dict.fromkeys(layer.model for layer in layers))
    groups = [models.index(layer.model) for layer in layers]
    sizes = curve_sizes(examples) if curve else ()
    twice = len({layer.name for layer in layers}) < len(layers)
    distances = [name for name in names if quantity(name).kind == "distance"]
    if distances and not twice:
        raise SpecError(
            f"{', '.join(distances)} compare one layer under two views, so that two subjects must have a layer of the "
            "same name, but no two have. Leave them out of --measures, or compare views of one network."
        )
    if "mutual-knn" in names and neighbours >= examples:
        raise SpecError(f"--neighbours must be below the {examples} examples, but is {neighbours}.")
    store = FeatureStore(labels, examples, Scratch(cache, 0 if in_files else BUDGET_BYTES))
    running = {}
    for name in names:
        tests = permutations or (mantel.PERMUTATIONS if name == "mantel" else 0)
        running[name] = MEASURES[name](
            labels, seed=seed, asked=Asked(groups, tests, sizes, bool(influence)), debiased=debiased,
            threshold=threshold, median=median, names=[layer.name for layer in layers], rdm=rdm,
            rdm_comparison=rdm_comparison, neighbours=neighbours, store=store,
        )  # fmt: skip
    return running


def curve_sizes(examples: int) -> list[int]:
    """Up to `CURVE_POINTS` numbers of examples, each twice the one before, the last of them all."""
    sizes = (examples >> halvings for halvings in reversed(range(CURVE_POINTS)))
    return sorted({size for size in sizes if size >= min(_LEAST_POINT, examples)})


def result_of(
    name: str,
    measure: Measure,
    layers: tuple[Layer, ...],
    provenance: Mapping[str, Any],
    *,
    pool: str | None,
    influence: int,
    identity: Callable[[int], str],
) -> Similarity:
    """What a measure found, labelled.

    Args:
        name: of the measure.
        measure: after the last batch.
        layers: its rows and columns.
        provenance: of the run.
        pool: as it was asked for.
        influence: how many influential examples are wanted.
        identity: of an example, by its number in the order of the run.
    """
    estimates = measure.compute()
    details = estimates.details
    undefined = estimates.values.diagonal().isnan().nonzero().flatten().tolist()
    if undefined:
        logger.warning(
            "%s over the images, so that %s is not defined (NaN) in their rows and columns: %s.",
            "Constant" if name == "cka" else "Without structure that the measure sees",
            name, ", ".join(str(layers[index]) for index in undefined),
        )  # fmt: skip
    if details.get("batches") == 1:
        logger.info("All images were one batch, so there are no standard errors; a smaller batch size gives them.")
    values, std_error, null = (part.cpu().numpy() for part in (estimates.values, estimates.std_error, estimates.null))
    used = pool or ("mean" if isinstance(measure, Collected) else "none")
    found = Similarity(
        values, std_error, null, layers, layers, name, {**provenance, "pool": used, **details},
        p_value=estimates.p_value, p_value_max=estimates.p_value_max, curve=_curve(estimates),
    )  # fmt: skip
    useless = alarm(found)
    if useless:
        logger.warning("%s", useless)
    foreign = between_networks(found) if quantity(name).kind == "distance" else []
    if foreign:
        logger.warning(
            "A distance compares one layer under two views of one network, but says nothing of different networks: "
            "%s is without meaning for %s.", name, ", ".join(foreign),
        )  # fmt: skip
    if estimates.influence is None:
        return found
    return replace(found, influence=_most_influential(found, estimates.influence, influence, identity))


def _curve(estimates: Estimates) -> Curve | None:
    if not estimates.curve:
        return None
    sizes, values, errors = zip(*estimates.curve, strict=True)
    return Curve(np.array(sizes), np.stack(values), np.stack(errors))


def _most_influential(
    similarity: Similarity, changes: NDArray[np.float32], wanted: int, identity: Callable[[int], str]
) -> tuple[Influence, ...]:
    """For each two models, the examples without which a value of their layers changes most, and which value that is."""
    found = []
    for first, second in model_pairs(similarity):
        rows, cols = (
            [i for i, layer in enumerate(similarity.rows) if layer.model == model] for model in (first, second)
        )
        block = np.nan_to_num(changes[:, rows][:, :, cols]).reshape(len(changes), -1)
        cells = np.abs(block).argmax(1)
        most = np.take_along_axis(block, cells[:, None], 1)[:, 0]
        for example in np.argsort(-np.abs(most), kind="stable")[:wanted].tolist():
            row, col = divmod(int(cells[example]), len(cols))
            layers = similarity.rows[rows[row]], similarity.rows[cols[col]]
            found.append(Influence(identity(example), *layers, float(most[example])))
    return tuple(found)
