"""compare(): from models and images to the similarity of all layers of all subjects, in one matrix."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch

from cka_probe.activations.hooks import evaluating
from cka_probe.activations.layers import choose_layers, parse_patterns
from cka_probe.activations.pooling import Pool
from cka_probe.activations.trace import DRY_RUN_IMAGES, TracedLayer
from cka_probe.errors import SpecError
from cka_probe.estimation.feature_store import BUDGET_BYTES, Scratch
from cka_probe.estimation.measure import Accumulator, Measure
from cka_probe.probing.dry_runs import traced_subject
from cka_probe.probing.in_turn.run import MemoryBudget, probe_in_turn
from cka_probe.probing.in_turn.weight_offload import WeightOffload
from cka_probe.probing.job import Job, Preview, Progress
from cka_probe.probing.measuring import Influential, result_of, start_measures
from cka_probe.probing.option_checks import check_models
from cka_probe.probing.options import Images, Measuring, Running, Selection, check_run
from cka_probe.probing.saved_state import Checkpoints
from cka_probe.probing.session import Session
from cka_probe.probing.stored_features import StoredFeatures
from cka_probe.probing.subjects import Model, Models, examples_and_subjects, named_subjects, preprocessed
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.devices import device_named
from cka_probe.runtime.folder.run_folder import RunFolder
from cka_probe.runtime.paths import usable_path
from cka_probe.runtime.provenance import versions
from cka_probe.runtime.ranges import IMAGE_SIZE
from cka_probe.runtime.sizes import parse_bytes
from cka_probe.runtime.world import World

if TYPE_CHECKING:
    from cka_probe.probing.options import Bytes, Channels, Data, Folder, Layers, Measures, Views

logger = logging.getLogger(__name__)


@overload
def compare(  # type: ignore[overload-overlap]  # a text is a sequence too; the first that fits counts
    models: Models, *,
    data: Data = Images.data, data_dir: str | None = Images.data_dir, download: bool = Images.download,
    split: str | None = Images.split, full_scale: float | None = Images.full_scale,
    skip_broken: bool = Images.skip_broken,
    image_size: int | None = Images.image_size, mean: Channels | None = Images.mean,
    std: Channels | None = Images.std, paired: Folder | None = Images.paired, views: Views = Images.views,
    examples: int = Images.examples, seed: int = Images.seed,
    layers: Layers = Measuring.layers, pool: Pool | None = Measuring.pool, measures: str | Measure = "cka",
    permutations: int = Measuring.permutations, curve: bool = Measuring.curve, influence: int = Measuring.influence,
    batch_size: int = Running.batch_size, device: str = Running.device, amp: bool = Running.amp,
    workers: int | None = Running.workers, memory: Bytes | None = Running.memory,
    scratch: Folder | None = Running.scratch, checkpoint: Folder | RunFolder | None = None,
    resume: bool = Running.resume, checkpoint_minutes: float = Running.checkpoint_minutes,
    progress: Progress | None = None, preview: Preview | None = None, world: World | None = None,
) -> Similarity: ...  # fmt: skip


@overload
def compare(
    models: Models, *,
    data: Data = Images.data, data_dir: str | None = Images.data_dir, download: bool = Images.download,
    split: str | None = Images.split, full_scale: float | None = Images.full_scale,
    skip_broken: bool = Images.skip_broken,
    image_size: int | None = Images.image_size, mean: Channels | None = Images.mean,
    std: Channels | None = Images.std, paired: Folder | None = Images.paired, views: Views = Images.views,
    examples: int = Images.examples, seed: int = Images.seed,
    layers: Layers = Measuring.layers, pool: Pool | None = Measuring.pool, measures: Sequence[str | Measure],
    permutations: int = Measuring.permutations, curve: bool = Measuring.curve, influence: int = Measuring.influence,
    batch_size: int = Running.batch_size, device: str = Running.device, amp: bool = Running.amp,
    workers: int | None = Running.workers, memory: Bytes | None = Running.memory,
    scratch: Folder | None = Running.scratch, checkpoint: Folder | RunFolder | None = None,
    resume: bool = Running.resume, checkpoint_minutes: float = Running.checkpoint_minutes,
    progress: Progress | None = None, preview: Preview | None = None, world: World | None = None,
) -> dict[str, Similarity]: ...  # fmt: skip


def compare(  # noqa: PLR0913  # public, keyword-only: one parameter for each option
    models: Models, *,
    data: Data = Images.data, data_dir: str | None = Images.data_dir, download: bool = Images.download,
    split: str | None = Images.split, full_scale: float | None = Images.full_scale,
    skip_broken: bool = Images.skip_broken,
    image_size: int | None = Images.image_size, mean: Channels | None = Images.mean,
    std: Channels | None = Images.std, paired: Folder | None = Images.paired, views: Views = Images.views,
    examples: int = Images.examples, seed: int = Images.seed,
    layers: Layers = Measuring.layers, pool: Pool | None = Measuring.pool, measures: Measures = Measuring.measures,
    permutations: int = Measuring.permutations, curve: bool = Measuring.curve, influence: int = Measuring.influence,
    batch_size: int = Running.batch_size, device: str = Running.device, amp: bool = Running.amp,
    workers: int | None = Running.workers, memory: Bytes | None = Running.memory,
    scratch: Folder | None = Running.scratch, checkpoint: Folder | RunFolder | None = None,
    resume: bool = Running.resume, checkpoint_minutes: float = Running.checkpoint_minutes,
    progress: Progress | None = None, preview: Preview | None = None, world: World | None = None,
) -> Similarity | dict[str, Similarity]:  # fmt: skip
    """How similar every layer of every model is to every other, on the same images, in one pass over them.

    Args:
        models: model specs (see `cka_probe.networks.specs`), modules or `Subject`s; folders of `cka_probe.extract`,
            ``.npy``, ``.npz`` or ``.safetensors`` files and arrays of features (n, d); a mapping gives them names. A
            module is given back as it came: its hooks, training flags and device.
        data: a data spec (see `cka_probe.images.sources.source.open_source`), or a dataset: of PIL images, which are
            preprocessed for each model, or of (c, h, w) tensors, which every model gets as they are. Unused for stored
            features alone.
        data_dir: where a data set such as ``"torch/cifar100"`` lies.
        download: fetch the data set where it can be.
        split: ``"train"``, ``"validation"`` or a data set's own name for a part.
        full_scale: the pixel value that is white in images of more than 8 bits: 4095 where 12 bits lie in files of 16.
            By default 65535 for 16 bits; images of 32 bits or of floating-point values need it.
        skip_broken: leave out images that cannot be read, for all models, and list them in the provenance; without it,
            the first one is an error. All images are read once before the run.
        image_size: height and width for every model, in place of each one's own.
        mean: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        std: per channel, on the scale 0 to 1, for every model, in place of each one's own.
        paired: a folder whose images are the partners of those of the folder ``data``, by their paths; each model
            then makes two subjects, ``"name [folder]"`` on one's images and on the other's.
        views: of the images (see `cka_probe.images.views`): a comma-separated string, or a sequence of specs and
            functions from a PIL image to one of the same size. Each model makes a subject a view, ``"name [view]"``.
        examples: images to use, at least 4; all of them where there are fewer.
        seed: of the choice and order of the images, of the shuffled control and of the permutations.
        layers: ``"blocks"``, ``"stages"``, ``"all"``, globs, ``"type:Conv2d"``: one, a comma-separated string, or a
            sequence. Each must match in one model at least, and each model must get a layer.
        pool: ``"none"`` flattens an activation; ``"mean"`` averages it over space or tokens; ``"cls"`` takes the class
            token where there is one, else the mean. Where None, CKA sees every value, and the measures that need all
            examples at once see the mean.
        measures: specs such as ``"cka"`` (linear), ``"cka:biased"``, ``"cka-rbf:0.8"`` or ``"rsa:kendall"``, or what
            they stand for, `cka_probe.RbfCKA` ``(threshold=0.8)``; a sequence of them gives a mapping. ``cka-probe
            measures`` lists all.
        permutations: of a permutation test of every value; none where 0. CKA permutes the images within batches, the
            other measures the first 2,048 of them. The Mantel test has its own number, ``"mantel:9999"``.
        curve: evaluate at up to six growing numbers of images too, each twice the one before.
        influence: of CKA: name so many images a pair of models that move its values most.
        batch_size: images a forward pass, at least 4. The estimator is a ratio of sums over batches, and larger
            batches make it steadier.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...
        amp: run the networks under autocast to bfloat16: much faster on a GPU, with the networks' own values as coarse
            as that. Gram matrices and sums keep their precision.
        workers: processes that decode images; by default a core less than there are, and none for the digits.
        memory: the memory limit, such as ``"8GB"``: of the GPU that the networks run on, else of this process (on
            Linux). Networks that do not fit together run one after the other, and their Gram matrices wait in a file in
            ``scratch``; the result is the same. The plan is logged before the run, and recorded beside the peak that
            was measured. The final evaluation of measures that need all images is not part of it.
        scratch: folder for features that do not fit into 3 GiB and, with ``memory``, for weights and Gram matrices; by
            default the system's temporary one.
        checkpoint: folder in which to save the partial sums now and then, and when the run is interrupted; they stay
            there when the comparison is done, and other files in it are left alone. Nothing is saved where None.
        resume: go on from what ``checkpoint`` holds; where it holds nothing, start.
        checkpoint_minutes: between two saves.
        progress: called after each batch with the images done and the images in all.
        preview: called once, with the first few images as each model sees them: its name -> (k, h, w, c) uint8.
        world: the processes that share the work, as `cka_probe.runtime.world.joined` gives them: all of them must make
            the same call, and all get the result. This process alone where None.

    Returns:
        The similarity of all layers with all layers; for a sequence of measures, a mapping from the spec of each, in
        its canonical form, to its similarity.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change. Subclasses: `cka_probe.errors`.
    """
    images = Images(
        data=data, data_dir=data_dir, download=download, split=split, full_scale=full_scale, skip_broken=skip_broken,
        image_size=image_size, mean=mean, std=std, paired=paired, views=views, examples=examples, seed=seed,
    )  # fmt: skip
    measuring = Measuring(
        layers=layers, pool=pool, measures=measures, permutations=permutations, curve=curve, influence=influence
    )
    running = Running(
        batch_size=batch_size, device=device, amp=amp, workers=workers, memory=memory, scratch=scratch, resume=resume,
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    check_run(models, images, measuring, running)
    single, chosen = isinstance(measures, (str, Measure)), measuring.parsed()
    if single and len(chosen) > 1:
        raise SpecError(f"Several measures must be a sequence: measures={[str(measure) for measure in chosen]}.")
    parse_patterns(layers)
    world = world or World(device_named(device))
    job = Job(images=images, features=measuring, running=running, world=world, progress=progress, preview=preview)
    results = run_comparison(models, job, checkpoint)
    return results[str(chosen[0])] if single else results


def run_comparison(models: Models, job: Job, checkpoint: Folder | RunFolder | None = None) -> dict[str, Similarity]:
    """As `compare`, of options that are checked.

    Args:
        models: as for `compare`.
        job: its features are a `Measuring`, and its running a `Running`.
        checkpoint: as for `compare`.
    """
    started = time.perf_counter()
    measuring, running, images, world = job.features, job.running, job.images, job.world
    assert isinstance(measuring, Measuring)
    assert isinstance(running, Running)
    chosen = measuring.parsed()
    scratch = None if running.scratch is None else usable_path(running.scratch, "--scratch")
    offload = None if running.memory is None else WeightOffload(scratch)
    on_cpu = world.device.type == "cpu"
    samples, subjects = examples_and_subjects(models, images, world, offload if on_cpu else None, running.workers)

    def start(labels: Sequence[Layer]) -> dict[str, Accumulator]:
        space = Scratch(scratch, 0 if running.memory is not None else BUDGET_BYTES)
        return start_measures(labels, len(samples), measuring, seed=images.seed, scratch=space)

    saved = None
    with _opened(checkpoint if offload is None else None, world) as folder:
        if running.memory is not None and offload is not None:
            budget = MemoryBudget(parse_bytes(running.memory), offload, scratch)
            labels, found, examined = probe_in_turn(subjects, samples, start, job, budget)
        else:
            saved = _saved(folder, measuring, running, images.seed)
            with Session(subjects, samples, job) as session:
                labels = session.trace()
                found = start(labels)
                session.run(found, saved)
                examined = session.record()
    seconds = time.perf_counter() - started + (saved.seconds_before if saved is not None else 0)
    provenance = replace(
        examined, seed=images.seed, processes=world.size, versions=versions(), seconds=round(seconds, 1)
    )
    influential = Influential(
        measuring.influence, lambda example: samples.source.identity(int(samples.indices[example]))
    )
    return world.from_first_in_the_end(
        {
            str(measure): result_of(measure, found[str(measure)], labels, provenance, influential)
            for measure in (chosen if world.writes else ())
        }
    )


def _saved(folder: RunFolder | None, measuring: Measuring, running: Running, seed: int) -> Checkpoints | None:
    """Where and when the run is saved, and what decides its result before the networks run."""
    if folder is None:
        return None
    decisive = {
        "what": "compare",
        "measures": [str(measure) for measure in measuring.parsed()],
        "seed": seed,
        "permutations": measuring.permutations,
        "curve": measuring.curve,
        "influence": bool(measuring.influence),
    }
    return Checkpoints(folder, "compare", decisive, resume=running.resume, minutes=running.checkpoint_minutes)


@contextmanager
def _opened(checkpoint: Folder | RunFolder | None, world: World) -> Iterator[RunFolder | None]:
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
    model: Model, *, layers: Layers = Selection.layers, image_size: int | None = Images.image_size
) -> tuple[TracedLayer, ...]:
    """The layers of one model that a selection picks, in forward order, found by a dry run on noise.

    Args:
        model: as for `compare`.
        layers: as for `compare`.
        image_size: height and width, in place of the model's own.

    Raises:
        CkaProbeError: the model cannot be loaded or run, or a pattern matches nothing.
    """
    IMAGE_SIZE.check("--image-size", image_size)
    check_models([model])
    subject = named_subjects([model])[0]
    if isinstance(subject, StoredFeatures):
        raise SpecError(
            f"Layers are those of a network, but {model} are stored features ({', '.join(subject.layers)})."
        )
    subject = preprocessed(subject, Images(image_size=image_size))
    with evaluating(subject.network, torch.device("cpu"), repr(subject.name)):
        noise = torch.rand(DRY_RUN_IMAGES, *subject.preprocessing.size, generator=torch.Generator().manual_seed(0))
        traced = traced_subject(subject, noise)
        (chosen,) = choose_layers([(subject.name, subject.network, traced)], parse_patterns(layers))
    return chosen
