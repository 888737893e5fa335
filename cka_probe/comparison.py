"""compare(): from models and images to the similarity of all layers of all subjects, in one matrix."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cka_probe.cost import Work, parse_bytes
from cka_probe.devices import device_named
from cka_probe.dry_runs import Preview, traced_subject
from cka_probe.errors import SpecError
from cka_probe.features import Pool
from cka_probe.hooks import evaluating
from cka_probe.layers import choose_layers, parse_patterns
from cka_probe.loop import probe_layers
from cka_probe.measures.catalogue import parse_measures
from cka_probe.measures.linear_cka import LinearCKA
from cka_probe.measures.measure import Accumulator, Measure
from cka_probe.measures.rbf_cka import RbfCKA
from cka_probe.measures.storage import BUDGET_BYTES, Scratch
from cka_probe.measuring import result_of, start_measures
from cka_probe.option_checks import check_compare_options, check_layers_options
from cka_probe.partial import Partial
from cka_probe.provenance import versions
from cka_probe.removed_options import refusing_removed
from cka_probe.resting import Bench
from cka_probe.rounds import Progress
from cka_probe.runtime.run_folder import RunFolder
from cka_probe.similarity import Layer, Similarity
from cka_probe.stored_features import StoredFeatures
from cka_probe.subjects import Model, examples_and_subjects, named_subjects, preprocessed
from cka_probe.trace import DRY_RUN_IMAGES, TracedLayer
from cka_probe.turns import Frugality, probe_in_turns
from cka_probe.usable_paths import usable_path
from cka_probe.views import ImageFunction, View
from cka_probe.world import World

logger = logging.getLogger(__name__)


@overload
def compare(
    models: Sequence[Model] | Mapping[str, Model], *, measures: str | Measure = "cka", **options: Any
) -> Similarity: ...


@overload
def compare(
    models: Sequence[Model] | Mapping[str, Model], *, measures: Sequence[str | Measure], **options: Any
) -> dict[str, Similarity]: ...


@refusing_removed  # type: ignore[misc]
def compare(  # the overloads' **options are these, and are not spelled out three times
    models: Sequence[Model] | Mapping[str, Model],
    *,
    data: str | Path | Dataset[Any] | Tensor = "digits",
    paired: str | Path | None = None,
    views: str | Sequence[str | ImageFunction | View] = "identity",
    layers: str | Sequence[str] = "blocks",
    measures: str | Measure | Sequence[str | Measure] = "cka",
    examples: int = 2048,
    batch_size: int = 128,
    pool: Pool | None = None,
    permutations: int = 0,
    curve: bool = False,
    influence: int = 0,
    scratch: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    amp: bool = False,
    memory: str | int | None = None,
    workers: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    checkpoint: str | Path | RunFolder | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 5.0,
    progress: Progress | None = None,
    preview: Preview | None = None,
    world: World | None = None,
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
        measures: specs such as ``"cka"`` (linear), ``"cka:biased"``, ``"cka-rbf:0.8"`` or ``"rsa:kendall"``, or what
            they stand for, `cka_probe.RbfCKA` ``(threshold=0.8)``; a sequence of them gives a mapping. ``cka-probe
            measures`` lists all.
        examples: images to use, at least 4; all of them where there are fewer.
        batch_size: images a forward pass, at least 4. The estimator is a ratio of sums over batches, and larger
            batches make it steadier.
        pool: ``"none"`` flattens an activation; ``"mean"`` averages it over space or tokens; ``"cls"`` takes the class
            token where there is one, else the mean. Where None, CKA sees every value, and the measures that need all
            examples at once see the mean.
        permutations: of a permutation test of every value; none where 0. CKA permutes the images within batches, the
            other measures the first 2,048 of them. The Mantel test has its own number, ``"mantel:9999"``.
        curve: evaluate at up to six growing numbers of images too, each twice the one before.
        influence: of CKA: name so many images a pair of models that move its values most.
        scratch: folder for the features that do not fit into 3 GiB, and for what waits where ``memory`` is limited; by
            default the system's temporary one.
        seed: of the choice and order of the images, of the shuffled control and of the permutations.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        amp: run the networks under autocast to bfloat16: much faster on a GPU, with the networks' own values as coarse
            as that. Gram matrices and sums keep their precision.
        memory: at most so much may be in use, such as ``"8GB"``: of the GPU that the networks run on, else of this
            process. Networks that do not fit together run in turn, and their Gram matrices wait in a file in
            ``scratch``; the result is the same. A plan is told before it starts, and recorded beside what it took.
            The final evaluation of measures that need all images is not part of it.
        workers: processes that decode images; by default a core less than there are, and none for the digits.
        split: ``"train"``, ``"validation"`` or a data set's own name for a part.
        data_dir: where a data set such as ``"torch/cifar100"`` lies.
        download: fetch the data set where it can be.
        image_size: height and width for every model, in place of each one's own.
        mean: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        std: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        checkpoint: folder in which to save the partial sums now and then, and when the run is interrupted; they stay
            there when the comparison is done, and other files in it are left alone. Nothing is saved where None.
        resume: go on from what ``checkpoint`` holds; where it holds nothing, start.
        checkpoint_minutes: between two saves.
        progress: called after each batch with the images done and the images in all.
        preview: called once, with the first few images as each model sees them: its name -> (k, h, w, c) uint8.
        world: the processes that share the work, as `cka_probe.world.joined` gives them: all of them must make the same
            call, and all get the result. This process alone where None.

    Returns:
        The similarity of all layers with all layers; for a sequence of measures, a mapping from the spec of each, in
        its canonical form, to its similarity.

    Raises:
        CkaProbeError: of one kind or another (see `cka_probe.errors`), where the caller can mend it.
    """
    started = time.perf_counter()
    single = isinstance(measures, (str, Measure))
    chosen = parse_measures(measures)
    if single and len(chosen) > 1:
        raise SpecError(f"Several measures must be a sequence: measures={[str(measure) for measure in chosen]}.")
    check_compare_options(
        models, data=data, paired=paired, views=views, measures=chosen, examples=examples, batch_size=batch_size,
        pool=pool, permutations=permutations, influence=influence, scratch=scratch, seed=seed, workers=workers,
        split=split, data_dir=data_dir, download=download, image_size=image_size, mean=mean, std=std,
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    # NumPy's numbers are taken, but cannot be written into a checkpoint or a record.
    examples, batch_size, seed = int(examples), int(batch_size), int(seed)
    permutations, influence = int(permutations), int(influence)
    scratch = None if scratch is None else usable_path(scratch, "--scratch")
    patterns = parse_patterns(layers)
    world = world or World(device_named(device))
    frugality = None if memory is None else Frugality(parse_bytes(memory), Bench(scratch), scratch)
    if frugality is not None and resume:
        raise SpecError(
            "A run with --memory is not saved before its end, so that it cannot be resumed. Use one of both."
        )
    decisive = {
        "what": "compare",
        "measures": [str(measure) for measure in chosen],
        "seed": seed,
        "permutations": permutations,
        "curve": curve,
        "influence": bool(influence),
    }
    samples, subjects = examples_and_subjects(
        models, data=data, paired=paired, views=views, examples=examples, seed=seed, split=split, data_dir=data_dir,
        download=download, image_size=image_size, mean=mean, std=std, world=world,
        bench=frugality.bench if frugality is not None and world.device.type == "cpu" else None,
    )  # fmt: skip

    def start(labels: Sequence[Layer]) -> dict[str, Accumulator]:
        return start_measures(
            chosen, labels, len(samples), seed=seed, permutations=permutations, curve=curve, influence=bool(influence),
            scratch=Scratch(scratch, 0 if frugality is not None else BUDGET_BYTES),
        )  # fmt: skip

    entries = [measure.gram_bytes for measure in chosen]
    work = Work(
        len(samples), min(batch_size, len(samples)), linear=entries.count(LinearCKA.gram_bytes),
        rbf=entries.count(RbfCKA.gram_bytes), permutations=permutations, influence=bool(influence),
    )  # fmt: skip
    with _opened(checkpoint if frugality is None else None, world) as folder:
        saved = None
        if folder is not None:
            saved = Partial(folder, "compare", decisive, resume=resume, minutes=checkpoint_minutes)
        probe = (
            partial(probe_layers, partial=saved)
            if frugality is None
            else partial(probe_in_turns, frugality=frugality, work=work)
        )
        labels, running, examined = probe(
            subjects, samples, start, patterns=patterns, batch_size=batch_size, pool=pool, amp=amp, where=world.device,
            seed=seed, workers=workers, progress=progress, preview=preview, world=world,
        )  # fmt: skip
    seconds = time.perf_counter() - started + (saved.seconds_before if saved is not None else 0)
    made = {"seed": seed, "processes": world.size, "versions": versions(), "seconds": round(seconds, 1)}
    provenance = {**examined, **made}
    results = {
        str(measure): result_of(
            measure, running[str(measure)], labels, provenance, pool=examined["pool"], influence=influence,
            identity=lambda example: samples.source.identity(int(samples.indices[example])),
        )
        for measure in (chosen if world.writes else ())
    }  # fmt: skip
    results = world.from_first_in_the_end(results)
    return results[str(chosen[0])] if single else results


@contextmanager
def _opened(checkpoint: str | Path | RunFolder | None, world: World) -> Iterator[RunFolder | None]:
    """The folder for checkpoints, locked by the process that writes; one that is open already stays open."""
    if checkpoint is None or isinstance(checkpoint, RunFolder):
        yield checkpoint
        return
    folder = RunFolder(checkpoint, option="checkpoint")
    with folder if world.writes else nullcontext():
        if world.writes:
            folder.check_checkpoints("compare")
        yield folder


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
    check_layers_options(model, image_size=image_size)
    subject = named_subjects([model])[0]
    if isinstance(subject, StoredFeatures):
        raise SpecError(
            f"Layers are those of a network, but {model} are stored features ({', '.join(subject.layers)})."
        )
    subject = preprocessed(subject, image_size, None, None)
    with evaluating(subject.network, torch.device("cpu"), repr(subject.name)):
        noise = torch.rand(DRY_RUN_IMAGES, *subject.preprocessing.size, generator=torch.Generator().manual_seed(0))
        traced = traced_subject(subject, noise)
        (chosen,) = choose_layers([(subject.name, subject.network, traced)], parse_patterns(layers))
    return chosen
