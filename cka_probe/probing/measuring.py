"""The measures of a run: started together on the layers, and turned into results at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import SpecError
from cka_probe.estimation.collected import LEAST_EXAMPLES, Collected, Doubt
from cka_probe.estimation.estimates import Estimates, Requests
from cka_probe.estimation.feature_store import FeatureStore, Scratch
from cka_probe.estimation.measure import Accumulator, Measure, Setup
from cka_probe.probing.options import Measuring
from cka_probe.results.cautions import alarm, between_networks, few_batches
from cka_probe.results.findings import model_pairs
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Curve, Influence, Layer, Similarity

logger = logging.getLogger(__name__)

CURVE_POINTS = 6
_LEAST_POINT = 16
_TOLD = 3  # layers that are in doubt


def start_measures(
    layers: Sequence[Layer],
    examples: int,
    measuring: Measuring,
    *,
    seed: int = 0,
    scratch: Scratch | None = None,
) -> dict[str, Accumulator]:
    """The measures by their specs, ready for the first batch. Those that need all examples share one store of features.

    Args:
        layers: of all subjects, one after the other.
        examples: how many there will be.
        measuring: what is measured.
        seed: of whatever is shuffled.
        scratch: where features lie; in memory as far as they fit where None.
    """
    measures = measuring.parsed()
    labels = [f"layer {layer.name!r} of {layer.model!r}" for layer in layers]
    models = list(dict.fromkeys(layer.model for layer in layers))
    groups = [models.index(layer.model) for layer in layers]
    sizes = curve_sizes(examples) if measuring.curve else ()
    twice = len({layer.name for layer in layers}) < len(layers)
    distances = [str(measure) for measure in measures if measure.about.kind == "distance"]
    if distances and not twice:
        raise SpecError(
            f"Distances ({', '.join(distances)}) compare a layer with the layer of the same name in another view or "
            "network, but no layer name occurs twice here. Leave them out of --measures, or compare views of a network."
        )
    store = FeatureStore(labels, examples, scratch or Scratch())
    requests = Requests(groups, measuring.permutations, sizes, bool(measuring.influence))
    for measure in measures:
        measure.check(examples)
    setup = Setup(labels, [layer.name for layer in layers], store, seed, requests)
    return {str(measure): measure.start(setup) for measure in measures}


def curve_sizes(examples: int) -> list[int]:
    """Up to `CURVE_POINTS` numbers of examples, each twice the one before, the last of them all."""
    sizes = (examples >> halvings for halvings in reversed(range(CURVE_POINTS)))
    return sorted({size for size in sizes if size >= min(_LEAST_POINT, examples)})


class Influential(NamedTuple):
    """The examples that move the values most.

    Attributes:
        wanted: how many for each pair of models.
        identity: of an example, by its number in the order of the run.
    """

    wanted: int
    identity: Callable[[int], str]


def result_of(
    measure: Measure,
    found: Accumulator,
    layers: tuple[Layer, ...],
    provenance: Provenance,
    influential: Influential,
) -> Similarity:
    """What a measure found, labelled.

    Args:
        measure: which.
        found: after the last batch.
        layers: its rows and columns.
        provenance: of the run.
        influential: which examples are wanted by name.
    """
    estimates = found.compute()
    details = estimates.details
    doubts: Mapping[int, Doubt] = details.pop("doubts", {})
    for index, doubt in list(doubts.items())[:_TOLD]:
        images = [influential.identity(example) for example in doubt.examples]
        some = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        logger.warning("In %s %s (%s).", layers[index], doubt.message.format(images=some), measure)
    if len(doubts) > _TOLD:
        logger.warning("The same holds, with other numbers, in %d more layers (%s).", len(doubts) - _TOLD, measure)
    undefined = estimates.values.diagonal().isnan().nonzero().flatten().tolist()
    undefined = [index for index in undefined if index not in doubts]
    if undefined:
        logger.warning(
            "%s over the images, so that %s is not defined (NaN) in their rows and columns: %s.",
            "Constant" if measure.name == "cka" else "Without structure that the measure sees",
            measure, ", ".join(str(layers[index]) for index in undefined),
        )  # fmt: skip
    if details.get("batches") == 1:
        logger.info("All images were one batch, so there are no standard errors; a smaller batch size gives them.")
    if details.get("blocks") == 0:
        logger.info("Too few images for standard errors of %s: %d or more give them.", measure, LEAST_EXAMPLES)
    values, std_error, null = (part.cpu().numpy() for part in (estimates.values, estimates.std_error, estimates.null))
    used = provenance.pool or ("mean" if isinstance(found, Collected) else "none")
    similarity = Similarity(
        values, std_error, null, layers, layers, str(measure), provenance.extended({"pool": used, **details}),
        p_value=estimates.p_value, p_value_max=estimates.p_value_max, curve=_curve(estimates),
        batches=None if estimates.batches is None else estimates.batches.cpu().numpy(),
    )  # fmt: skip
    for trouble in filter(None, (alarm(similarity), few_batches(similarity))):
        logger.warning("%s", trouble)
    foreign = between_networks(similarity) if measure.about.kind == "distance" else []
    if foreign:
        logger.warning(
            "A distance compares one layer under two views of one network, but says nothing of different networks: "
            "%s is without meaning for %s.", measure, ", ".join(foreign),
        )  # fmt: skip
    if estimates.influence is None:
        return similarity
    return replace(similarity, influence=_most_influential(similarity, estimates.influence, influential))


def _curve(estimates: Estimates) -> Curve | None:
    if not estimates.curve:
        return None
    sizes, values, errors = zip(*estimates.curve, strict=True)
    return Curve(np.array(sizes), np.stack(values), np.stack(errors))


def _most_influential(
    similarity: Similarity, changes: NDArray[np.float32], influential: Influential
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
        for example in np.argsort(-np.abs(most), kind="stable")[: influential.wanted].tolist():
            row, col = divmod(int(cells[example]), len(cols))
            layers = similarity.rows[rows[row]], similarity.rows[cols[col]]
            found.append(Influence(influential.identity(example), *layers, float(most[example])))
    return tuple(found)
