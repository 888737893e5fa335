"""compare(): the one probing loop. A subject runs once a batch, and all layers of all subjects meet in one matrix."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cka_probe.data import Samples, Transform, batches, default_workers, holds_tensors
from cka_probe.errors import FeatureError, NetworkError, SpecError
from cka_probe.features import Pool
from cka_probe.hooks import evaluating
from cka_probe.kernels import MIN_EXAMPLES, MedianRule
from cka_probe.layers import choose_layers, parse_patterns
from cka_probe.measures import Measure
from cka_probe.measures.knn import NEIGHBOURS
from cka_probe.measures.rdms import Comparison, Rdm
from cka_probe.measuring import check_measures, result_of, start_measures
from cka_probe.memory import explaining_out_of_memory, keeping_freed_memory
from cka_probe.models import Subject, as_pixels
from cka_probe.probing import Probe, Receiver, StoredProbe, probes_of
from cka_probe.provenance import versions
from cka_probe.similarity import Layer, Similarity
from cka_probe.stored_features import StoredFeatures
from cka_probe.subjects import Model, examples_and_subjects, named_subjects, preprocessed
from cka_probe.trace import DRY_RUN_IMAGES, Trace, TracedLayer, trace
from cka_probe.views import ImageFunction, View

logger = logging.getLogger(__name__)

_PREVIEWED = 8

R = TypeVar("R", bound=Receiver)

Progress = Callable[[int, int], None]
Preview = Callable[[Mapping[str, NDArray[np.uint8]]], None]


@overload
def compare(models: Sequence[Model] | Mapping[str, Model], *, measures: str = "cka", **options: Any) -> Similarity: ...


@overload
def compare(
    models: Sequence[Model] | Mapping[str, Model], *, measures: Sequence[str], **options: Any
) -> dict[str, Similarity]: ...


def compare(  # type: ignore[misc]  # the overloads' **options are these, and are not spelled out three times
    models: Sequence[Model] | Mapping[str, Model],
    *,
    data: str | Path | Dataset[Any] | Tensor = "digits",
    paired: str | Path | None = None,
    views: str | Sequence[str | ImageFunction | View] = "identity",
    layers: str | Sequence[str] = "blocks",
    measures: str | Sequence[str] = "cka",
    examples: int = 2048,
    batch_size: int = 128,
    pool: Pool | None = None,
    debiased: bool = True,
    threshold: float = 1.0,
    median: MedianRule = "off-diagonal",
    rdm: Rdm = "correlation",
    rdm_comparison: Comparison = "spearman",
    neighbours: int = NEIGHBOURS,
    permutations: int = 0,
    curve: bool = False,
    influence: int = 0,
    cache: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: Progress | None = None,
    preview: Preview | None = None,
) -> Similarity | dict[str, Similarity]:
    """How similar every layer of every model is to every other, on the same images, in one pass over them.

    Args:
        models: model specs (see `cka_probe.models`), modules or `Subject`s; folders of `cka_probe.extract`, ``.npy``,
            ``.npz`` or ``.safetensors`` files and arrays of features (n, d); a mapping gives them names. A module is
            given back as it came: its hooks, training flags and device.
        data: a data spec (see `cka_probe.sources.open_source`), or a dataset: of PIL images, which are preprocessed for
            each model, or of (c, h, w) tensors, which every model gets as they are. Unused for stored features alone.
        paired: a folder whose images are the partners of those of the folder ``data``, by their paths; each model
            then makes two subjects, ``"name [folder]"`` on one's images and on the other's.
        views: of the images (see `cka_probe.views`): a comma-separated string, or a sequence of specs and functions
            from a PIL image to one of the same size. Each model makes a subject a view, ``"name [view]"``.
        layers: ``"blocks"``, ``"stages"``, ``"all"``, globs, ``"type:Conv2d"``: one, a comma-separated string, or a
            sequence. Each must match in one model at least, and each model must get a layer.
        measures: names of `cka_probe.measures.MEASURES`, such as ``"cka"`` (linear), ``"cka-rbf"`` or ``"rsa"``; a
            sequence of them gives a mapping.
        examples: images to use, at least 4; all of them where there are fewer.
        batch_size: images a forward pass, at least 4. The estimator is a ratio of sums over batches, and larger
            batches make it steadier.
        pool: ``"none"`` flattens an activation; ``"mean"`` averages it over space or tokens; ``"cls"`` takes the class
            token where there is one, else the mean. Where None, CKA sees every value, and the measures that need all
            examples at once see the mean.
        debiased: use the unbiased HSIC (Song et al. 2012), else the biased one (Gretton et al. 2005).
        threshold: of the RBF kernel: its bandwidth as a multiple of the median distance.
        median: of the RBF kernel: over which distances (see `cka_probe.kernels.squared_bandwidth`).
        rdm: of RSA and the Mantel test: the dissimilarity of two images (see `cka_probe.rsa`).
        rdm_comparison: of RSA: the correlation of two RDMs.
        neighbours: of mutual k-nearest neighbours: k.
        permutations: of a permutation test of every value; none where 0, but 999 for the Mantel test. CKA permutes the
            images within batches, the other measures the first 2,048 of them.
        curve: evaluate at up to six growing numbers of images too, each twice the one before.
        influence: of CKA: name so many images a pair of models that move its values most.
        cache: folder for the features that do not fit into 3 GiB; by default the system's temporary one.
        seed: of the choice and order of the images, of the shuffled control and of the permutations.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        workers: processes that decode images; by default a core less than there are, and none for the digits.
        split: ``"train"``, ``"validation"`` or a data set's own name for a part.
        data_dir: where a data set such as ``"torch/cifar100"`` lies.
        download: fetch the data set where it can be.
        image_size: height and width for every model, in place of each one's own.
        mean: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        std: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        progress: called after each batch with the images done and the images in all.
        preview: called once, with the first few images as each model sees them: its name -> (k, h, w, c) uint8.

    Returns:
        The similarity of all layers with all layers; for a sequence of measures, a mapping from measure to similarity.

    Raises:
        CkaProbeError: of one kind or another (see `cka_probe.errors`), where the caller can mend it.
    """
    started = time.perf_counter()
    names = (measures,) if isinstance(measures, str) else tuple(measures)
    check_measures(names, permutations, influence)
    check_options(batch_size, pool, seed, workers)
    patterns = parse_patterns(layers)
    where = device_named(device)
    samples, subjects = examples_and_subjects(
        models, data=data, paired=paired, views=views, examples=examples, seed=seed, split=split, data_dir=data_dir,
        download=download, image_size=image_size, mean=mean, std=std,
    )  # fmt: skip

    def start(labels: Sequence[Layer]) -> dict[str, Measure]:
        return start_measures(
            names, labels, len(samples), seed=seed, debiased=debiased, threshold=threshold, median=median, rdm=rdm,
            rdm_comparison=rdm_comparison, neighbours=neighbours, permutations=permutations, curve=curve,
            influence=influence, cache=cache,
        )  # fmt: skip

    labels, running, examined = probe_layers(
        subjects, samples, start, patterns=patterns, batch_size=batch_size, pool=pool, where=where, workers=workers,
        progress=progress, preview=preview,
    )  # fmt: skip
    made = {"seed": seed, "versions": versions(), "seconds": round(time.perf_counter() - started, 1)}
    provenance = {**examined, **made}
    results = {
        name: result_of(
            name, measure, labels, provenance, pool=examined["pool"], influence=influence,
            identity=lambda example: samples.source.identity(samples.indices[example]),
        )
        for name, measure in running.items()
    }  # fmt: skip
    return results[names[0]] if isinstance(measures, str) else results


def probe_layers(
    subjects: Sequence[Subject | StoredFeatures],
    samples: Samples,
    start: Callable[[Sequence[Layer]], dict[str, R]],
    *,
    patterns: Sequence[str],
    batch_size: int,
    pool: Pool | None,
    where: torch.device,
    workers: int | None = None,
    progress: Progress | None = None,
    preview: Preview | None = None,
) -> tuple[tuple[Layer, ...], dict[str, R], dict[str, Any]]:
    """The one probing loop: every network runs on every batch, and each layer's features go to the measures.

    Args:
        subjects: networks, and features that are stored.
        samples: the examples, the same for all.
        start: makes the measures, by name, from the labels of all layers, subject by subject.
        patterns: of layers, as for `cka_probe.layers.select`.
        batch_size: as for `compare`; so are the others.
        pool: from an activation to features.
        where: the networks run.
        workers: processes that decode images.
        progress: called after each batch.
        preview: called once.

    Returns:
        The labels; the measures, after all batches; and what was examined, for the record.
    """
    networks = [subject for subject in subjects if isinstance(subject, Subject)]
    stored = [subject for subject in subjects if isinstance(subject, StoredFeatures)]
    tensors = bool(networks) and holds_tensors(samples)
    looks = list(dict.fromkeys(subject.look for subject in networks))
    seen_as = {subject.name: looks.index(subject.look) for subject in networks}
    transforms = [preprocessing.transform(view) for preprocessing, view, _ in looks]
    sides = [side for _, _, side in looks]

    with ExitStack() as stack:
        stack.enter_context(keeping_freed_memory(where))
        for subject in {id(subject.network): subject for subject in networks}.values():  # the views of a model share it
            with explaining_out_of_memory(f"moving {subject.name!r} to {where}", None, batch_size):
                stack.enter_context(evaluating(subject.network, where))
        head = _head(samples)
        first = next(batches(head, transforms, batch_size=len(head), workers=0, sides=sides)) if networks else []
        if preview is not None:
            preview({s.name: as_pixels(first[seen_as[s.name]], s.preprocessing) for s in networks})
        traces = {s.name: _traced(s, first[seen_as[s.name]][:DRY_RUN_IMAGES].to(where)) for s in networks}
        picked = {s.name: s.matching(patterns) for s in stored}
        matched = {pattern for s in stored for pattern in patterns if s.matching([pattern])}
        known = [(s.name, s.network, traces[s.name]) for s in networks]
        traced = dict(zip(traces, choose_layers(known, patterns, matched=matched), strict=True))
        if networks:
            _check_class_tokens(pool, list(traced.values()))
        chosen = {**{name: [layer.name for layer in own] for name, own in traced.items()}, **picked}
        labels = tuple(Layer(subject.name, layer) for subject in subjects for layer in chosen[subject.name])
        running = start(labels)
        probes = probes_of(subjects, traces, traced, picked, list(running.values()), pool, where)
        count = default_workers(samples.source) if workers is None else workers
        done = 0
        for rows, batch in _rounds(samples, transforms, sides, batch_size, count, where):
            with explaining_out_of_memory(f"copying the images to {where}", None, batch_size):
                on_device = [images.to(where, non_blocking=True) for images in batch]
            for probe in probes:
                if isinstance(probe, StoredProbe):
                    probe.run(rows)
                    continue
                subject = probe.subject
                with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, batch_size):
                    probe.run(on_device[seen_as[subject.name]])
            with explaining_out_of_memory(f"the similarities of {len(labels)} layers", None, batch_size):
                for measure in running.values():
                    measure.update()
            done += len(rows)
            if progress is not None:
                progress(done, len(samples))

    if done < len(samples):
        logger.info("The last %d images are left out: a batch needs at least 4.", len(samples) - done)
    source = samples.source
    pools = {str(subject.source.get("pool", "none")) for subject in stored}
    examined = {
        "subjects": [_described(probe, traces, tensors) for probe in probes],
        "data": {
            "source": source.name,
            **({"paired": samples.paired.name} if samples.paired is not None else {}),
            "images": len(source),
            "examples": done,
            "sample_sha256": samples.sha256,
        },
        "layers": list(patterns),
        "batch_size": batch_size,
        "pool": pool if networks or len(pools) > 1 else pools.pop(),
        "device": _device_name(where),
    }
    return labels, running, examined


def _rounds(
    samples: Samples,
    transforms: Sequence[Transform],
    sides: Sequence[int],
    batch_size: int,
    workers: int,
    where: torch.device,
) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
    """Batch by batch, the rows of stored features and the images of the networks, one tensor a transform."""
    if transforms:
        done = 0  # stored features that stand beside networks have the order of their samples
        for batch in batches(
            samples, transforms, batch_size=batch_size, workers=workers, pin_memory=where.type == "cuda", sides=sides
        ):
            yield range(done, done + len(batch[0])), batch
            done += len(batch[0])
        return
    for first in range(0, len(samples), batch_size):
        rows = samples.indices[first : first + batch_size]
        if len(rows) >= MIN_EXAMPLES:
            yield rows, []


def list_layers(
    model: Model, *, layers: str | Sequence[str] = "blocks", image_size: int | None = None
) -> tuple[TracedLayer, ...]:
    """The layers of one model that a selection picks, in forward order, found by a dry run on noise.

    Args:
        model: as for `compare`.
        layers: as for `compare`.
        image_size: height and width, in place of the model's own.

    Raises:
        CkaProbeError: the model cannot be loaded or run, or a pattern matches nothing.
    """
    subject = named_subjects([model])[0]
    if isinstance(subject, StoredFeatures):
        raise SpecError(
            f"Layers are those of a network, but {model} are stored features ({', '.join(subject.layers)})."
        )
    subject = preprocessed(subject, image_size, None, None)
    with evaluating(subject.network, torch.device("cpu")):
        noise = torch.rand(DRY_RUN_IMAGES, *subject.preprocessing.size, generator=torch.Generator().manual_seed(0))
        traced = _traced(subject, noise)
        (chosen,) = choose_layers([(subject.name, subject.network, traced)], parse_patterns(layers))
    return chosen


def _head(samples: Samples) -> Samples:
    """The first few, enough for a dry run and a preview."""
    return replace(samples, indices=samples.indices[: max(DRY_RUN_IMAGES, _PREVIEWED)])


def _traced(subject: Subject, images: Tensor) -> Trace:
    try:
        with explaining_out_of_memory(f"the forward pass of {subject.name!r}", subject.network, len(images)):
            return trace(subject.network, images)
    except NetworkError as error:
        raise NetworkError(f"{subject.name!r} cannot be run. {error}") from error


def _described(probe: Probe | StoredProbe, traces: Mapping[str, Trace], tensors: bool) -> dict[str, Any]:
    subject = probe.subject
    if isinstance(subject, StoredFeatures):
        return {**subject.source, "name": subject.name, "features": dict(probe.features)}
    preprocessing = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(subject.preprocessing).items()
    }
    return {
        "name": subject.name,
        **subject.source,
        "parameters": sum(parameter.numel() for parameter in subject.network.parameters()),
        "preprocessing": "none: the data are tensors" if tensors else preprocessing,
        "view": {"name": subject.view.name, **subject.view.record},
        "features": dict(probe.features),
        "left_out": dict(traces[subject.name].left_out),
    }


def check_options(batch_size: int, pool: str | None, seed: int, workers: int | None) -> None:
    """Raise where an option has a value that it cannot have: before the work, not after."""
    if batch_size < MIN_EXAMPLES:
        raise FeatureError(
            f"The unbiased HSIC needs at least {MIN_EXAMPLES} examples a batch, but the batch size is {batch_size}."
        )
    if seed < 0 or (workers is not None and workers < 0):
        raise SpecError(f"seed and workers must be 0 or more, but are {seed} and {workers}.")
    if pool not in (None, "none", "mean", "cls"):
        raise SpecError(f"pool must be 'none', 'mean' or 'cls', but is {pool!r}.")


def _check_class_tokens(pool: Pool | None, chosen: Sequence[Sequence[TracedLayer]]) -> None:
    if pool == "cls" and not any(layer.layout.prefix_tokens for layers in chosen for layer in layers):
        raise SpecError("--pool cls needs a network with a class token, but none of these layers has one. Use mean.")


def device_named(name: str) -> torch.device:
    """The device of that name, which must be there; ``"auto"`` is CUDA where there is one.

    Raises:
        SpecError: it is not there, or has no float64.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "mps":
            raise SpecError("The device 'mps' has no float64, which the sums need. Use --device cpu.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise SpecError(f"The device {name!r} must be there, but is not. There are: {', '.join(there)}.") from error
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
