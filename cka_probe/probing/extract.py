"""extract(): the features of networks, kept on disk for other tools and for later comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.activations.pooling import Pool
from cka_probe.errors import CheckpointError, FeatureError, OutputError, SpecError
from cka_probe.estimation.gram import Features
from cka_probe.images.batches import batch_count
from cka_probe.images.samples import identities_sha256
from cka_probe.networks.models import Subject
from cka_probe.probing.feature_files import FeatureFile
from cka_probe.probing.job import Job, Progress
from cka_probe.probing.option_checks import input_paths
from cka_probe.probing.options import Execution, FeatureOptions, Images, check_run
from cka_probe.probing.saved_state import Checkpoints
from cka_probe.probing.session import Session
from cka_probe.probing.stored_features import SAMPLES
from cka_probe.probing.subjects import Models, examples_and_subjects
from cka_probe.results.similarity import Layer
from cka_probe.runtime.devices import device_named
from cka_probe.runtime.folder.run_folder import RECORD, REPORT, RESULTS, RunFolder, linked
from cka_probe.runtime.names import file_names, quoted
from cka_probe.runtime.provenance import versions
from cka_probe.runtime.records import write_record
from cka_probe.runtime.world import World

if TYPE_CHECKING:
    from cka_probe.probing.options import Channels, Data, Folder, Layers, Views

FILES = (SAMPLES, RECORD)
"""What an extraction writes, whatever the models: a file of features for each comes beside them."""


def extract(  # noqa: PLR0913  # public, keyword-only: one parameter for each option
    models: Models, out: Folder | RunFolder, *,
    data: Data = Images.data, data_dir: str | None = Images.data_dir, download: bool = Images.download,
    split: str | None = Images.split, full_scale: float | None = Images.full_scale,
    skip_broken: bool = Images.skip_broken,
    image_size: int | None = Images.image_size, mean: Channels | None = Images.mean,
    std: Channels | None = Images.std, paired: Folder | None = Images.paired, views: Views = Images.views,
    examples: int = Images.examples, seed: int = Images.seed,
    layers: Layers = FeatureOptions.layers, pool: Pool | None = FeatureOptions.pool,
    batch_size: int = Execution.batch_size, device: str = Execution.device, amp: bool = Execution.amp,
    workers: int | None = Execution.workers, resume: bool = Execution.resume,
    checkpoint_minutes: float = Execution.checkpoint_minutes, overwrite: bool = False,
    record: Mapping[str, Any] | None = None, progress: Progress | None = None, world: World | None = None,
) -> list[Path]:  # fmt: skip
    """Write the features of every layer of every model into a folder, in one pass over the images.

    A safetensors file a subject holds, for each layer, its (n, d) float32 features, the examples in the order of
    ``samples.txt``; ``run.yaml`` records how they were made. The files are written batch by batch: memory does not grow
    with the examples. `cka_probe.compare` takes the folder as it takes models.

    Args:
        models: as for `cka_probe.compare`, networks only.
        out: the folder, new or empty.
        data: as for `cka_probe.compare`; so are the others that it has too.
        data_dir: where a data set lies.
        download: fetch the data set where it can be.
        split: of the data.
        full_scale: of images of more than 8 bits.
        skip_broken: leave out images that cannot be read.
        image_size: for every model.
        mean: for every model.
        std: for every model.
        paired: a folder of partners of the images.
        views: of the images.
        examples: images to use, at least 4; all of them where there are fewer.
        seed: of the choice and order of the images.
        layers: which.
        pool: ``"mean"``, the default, keeps a number a channel, ``"cls"`` those of the class token, ``"none"`` every
            value of an activation, which is much.
        batch_size: images a forward pass, at least 4. A last batch of fewer than 4 is left out, as in a comparison.
        device: where the networks run.
        amp: run the networks under autocast to bfloat16.
        workers: processes that decode images.
        resume: go on with the extraction that was begun in ``out``; where there is none, begin.
        checkpoint_minutes: between two notes of how far it is, from which it can be resumed.
        overwrite: replace the features that are in ``out`` already.
        record: what else ``run.yaml`` records, such as the command.
        progress: called after each batch with the images done and the images in all.
        world: the processes that share the work; rank 0 writes the files.

    Returns:
        The files, one a subject.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change. Subclasses: `cka_probe.errors`.
    """
    images = Images(
        data=data, data_dir=data_dir, download=download, split=split, full_scale=full_scale, skip_broken=skip_broken,
        image_size=image_size, mean=mean, std=std, paired=paired, views=views, examples=examples, seed=seed,
    )  # fmt: skip
    features = FeatureOptions(layers=layers, pool=pool)
    running = Execution(
        batch_size=batch_size, device=device, amp=amp, workers=workers, resume=resume,
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    check_run(models, images, features, running)
    world = world or World(device_named(device))
    job = Job(images=images, features=features, running=running, world=world, progress=progress)
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    folder.check_origin(overwrite=overwrite, writes=FILES)
    with folder if world.writes and folder is not out else nullcontext():
        if world.writes:
            if overwrite:
                given = list(models.values()) if isinstance(models, Mapping) else models
                folder.check_inputs(input_paths(given, data, paired))
            folder.claim("extract", resume=resume, overwrite=overwrite, writes=FILES)
        return run_extraction(models, job, folder, record or {})


def run_extraction(models: Models, job: Job, folder: RunFolder, record: Mapping[str, Any]) -> list[Path]:
    """As `extract`, of options that are checked, in a folder that is claimed.

    Args:
        models: as for `extract`.
        job: what was asked for.
        folder: of the run, entered.
        record: what else ``run.yaml`` records.
    """
    images, running, world = job.images, job.running, job.world
    features = replace(job.features, pool=job.features.pool or "mean")
    job = replace(job, features=features, merge_often=True)
    decisive = {"what": "extract", "seed": images.seed}
    saved = Checkpoints(folder, "extract", decisive, resume=running.resume, minutes=running.checkpoint_minutes)
    samples, found = examples_and_subjects(models, images, world, workers=running.workers)
    subjects = [subject for subject in found if isinstance(subject, Subject)]
    if len(subjects) < len(found):
        raise SpecError("Features are extracted from networks, but some of these are stored features already.")
    used = min(batch_count(len(samples), running.batch_size) * running.batch_size, len(samples))
    sha256 = identities_sha256(samples.source, samples.indices[:used])
    stems = file_names([subject.name for subject in subjects])
    names = {name: f"{stem}.safetensors" for name, stem in stems.items()}
    if world.writes:
        folder.check_free(names.values())
    metadata = {"sample_sha256": sha256, "pool": str(features.pool)}
    with Session(subjects, samples, job) as session, _Recorder(folder, names, metadata, world) as recorder:
        recorder.expect(session.trace(), used)
        session.run({"features": recorder}, saved)
        examined = session.record()
    if world.writes:
        assert examined.data is not None
        made = replace(
            examined,
            subjects=tuple(replace(one, others={**one.others, "file": names[one.name]}) for one in examined.subjects),
            data=replace(examined.data, sample_sha256=sha256),
            seed=images.seed,
            versions=versions(),
        )
        with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="extract") as stage:
            for path in recorder.paths.values():
                linked(path, stage / path.name)  # until all is in place, the run can be resumed
            with (stage / SAMPLES).open("w", encoding="utf-8") as file:
                for position, index in enumerate(samples.indices[:used]):
                    file.write(("\n" if position else "") + quoted(samples.source.identity(int(index))))
            write_record(stage, {**record, "result": made.as_record()})
    return [folder.path / name for name in names.values()]


class _Recorder:
    """Takes the place of a measure in the probing loop, and writes what it is given.

    Args:
        folder: of the run.
        names: subject -> the name of its file.
        metadata: for the files' headers.
        world: the processes of the run; rank 0 writes.

    Attributes:
        paths: subject -> its file, while the run is not finished.
    """

    def __init__(self, folder: RunFolder, names: Mapping[str, str], metadata: Mapping[str, str], world: World) -> None:
        self._folder, self._names, self._world = folder, names, world
        self.paths: dict[str, Path] = {}
        self._sent: dict[int, dict[int, Tensor]] = {}  # of a process that does not write: layer -> first -> features
        self._rows = 0
        self._metadata = metadata
        self._labels: Sequence[Layer] = ()
        self._batch: dict[int, NDArray[np.float32]] = {}
        self._files: dict[str, FeatureFile] = {}
        self._widths: dict[int, int] = {}

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as closing:  # all of them, whatever one raises
            for file in self._files.values():
                closing.callback(file.close)

    def expect(self, labels: Sequence[Layer], rows: int) -> None:
        """Of these layers, so many examples will come."""
        self._labels, self._rows = labels, rows

    def prepare(self, layer: int, features: Features) -> None:
        """Keep the features of a layer, by its index, for the batch under way."""
        if not torch.isfinite(features.x).all():
            raise FeatureError(
                f"The features of every layer must be finite, but those of layer {self._labels[layer].name!r} of "
                f"{self._labels[layer].model!r} hold NaN or infinity. Check the weights and the preprocessing."
            )
        self._batch[layer] = features.x.detach().to("cpu", torch.float32, copy=True).numpy()

    def update(self, first: int) -> None:
        """Write the batch, whose first example has that number, once every layer was prepared."""
        if not self._world.writes:
            self._sent = {index: {first: torch.from_numpy(rows)} for index, rows in self._batch.items()}
        else:
            if not self._files:  # how wide a layer is, is known from its first batch on
                self._open({index: rows.shape[1] for index, rows in self._batch.items()})
            for index, rows in self._batch.items():
                self._write(index, first, rows)
        self._batch.clear()

    def settle(self, world: World) -> None:
        """Nothing is decided by the first batch."""

    def merge(self, world: World) -> None:
        """Write what the other processes have."""
        for index in range(len(self._labels)):
            for first, rows in world.blocks_to_first(self._sent.get(index, {})):
                self._write(index, first, rows.numpy())
        self._sent = {}

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs: the features themselves lie in the files."""
        for file in self._files.values():
            file.sync()
        return {"widths": self._widths}

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Go on with the files that were begun.

        Raises:
            CheckpointError: they are not there, or are others.
        """
        missing = [name for name in self._names.values() if not (folder / name).exists()]
        if missing:
            raise CheckpointError(f"{folder / missing[0]} was begun, but is not there. Start over with --overwrite.")
        self._open(state["widths"])

    def _open(self, widths: Mapping[int, int]) -> None:
        self._widths = dict(widths)
        scratch = self._folder.scratch()
        self.paths = {model: scratch / name for model, name in self._names.items()}
        for model, path in self.paths.items():
            own = {label.name: widths[index] for index, label in enumerate(self._labels) if label.model == model}
            try:
                self._files[model] = FeatureFile(path, self._rows, own, self._metadata)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error}") from error

    def _write(self, index: int, first: int, rows: NDArray[np.float32]) -> None:
        label = self._labels[index]
        self._files[label.model].write(label.name, first, rows)
