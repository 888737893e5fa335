"""extract(): the features of networks, kept on disk for other tools and for later comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cka_probe.data import batch_count, identities_sha256
from cka_probe.devices import device_named
from cka_probe.errors import CheckpointError, FeatureError, OutputError, SpecError
from cka_probe.feature_files import FeatureFile
from cka_probe.features import Features, Pool
from cka_probe.layers import parse_patterns
from cka_probe.loop import probe_layers
from cka_probe.models import Subject
from cka_probe.names import quoted
from cka_probe.option_checks import check_extract_options, input_paths
from cka_probe.partial import Partial
from cka_probe.provenance import versions
from cka_probe.rounds import Progress
from cka_probe.run_directory import file_names, write_record
from cka_probe.runtime.run_folder import RECORD, REPORT, RESULTS, RunFolder, linked
from cka_probe.similarity import Layer
from cka_probe.stored_features import SAMPLES
from cka_probe.subjects import Model, examples_and_subjects
from cka_probe.views import ImageFunction, View
from cka_probe.world import World

FILES = (SAMPLES, RECORD)
"""What an extraction writes, whatever the models: a file of features for each comes beside them."""


def extract(
    models: Sequence[Model] | Mapping[str, Model],
    out: str | Path | RunFolder,
    *,
    data: str | Path | Dataset[Any] | Tensor = "digits",
    paired: str | Path | None = None,
    views: str | Sequence[str | ImageFunction | View] = "identity",
    layers: str | Sequence[str] = "blocks",
    examples: int = 2048,
    batch_size: int = 128,
    pool: Pool = "mean",
    seed: int = 0,
    device: str = "auto",
    amp: bool = False,
    workers: int | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_minutes: float = 5.0,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> list[Path]:
    """Write the features of every layer of every model into a folder, in one pass over the images.

    A safetensors file a subject holds, for each layer, its (n, d) float32 features, the examples in the order of
    ``samples.txt``; ``run.yaml`` tells how they were made. The files are written batch by batch: memory does not grow
    with the examples. `cka_probe.compare` takes the folder as it takes models.

    Args:
        models: as for `cka_probe.compare`, networks only.
        out: the folder, new or empty.
        data: as for `cka_probe.compare`.
        paired: as for `cka_probe.compare`.
        views: as for `cka_probe.compare`.
        layers: as for `cka_probe.compare`.
        examples: images to use, at least 4; all of them where there are fewer.
        batch_size: images a forward pass, at least 4. A last batch of fewer than 4 is left out, as in a comparison.
        pool: ``"mean"`` keeps a number a channel, ``"cls"`` those of the class token, ``"none"`` every value of an
            activation, which is much.
        seed: of the choice and order of the images.
        device: as for `cka_probe.compare`.
        amp: as for `cka_probe.compare`.
        workers: as for `cka_probe.compare`.
        split: as for `cka_probe.compare`.
        data_dir: as for `cka_probe.compare`.
        download: as for `cka_probe.compare`.
        image_size: as for `cka_probe.compare`.
        mean: as for `cka_probe.compare`.
        std: as for `cka_probe.compare`.
        overwrite: replace the features that are in ``out`` already.
        resume: go on with the extraction that was begun in ``out``; where there is none, begin.
        checkpoint_minutes: between two notes of how far it is, from which it can be resumed.
        record: what else ``run.yaml`` should tell, such as the command.
        progress: called after each batch with the images done and the images in all.
        world: as for `cka_probe.compare`; rank 0 writes the files.

    Returns:
        The files, one a subject.

    Raises:
        CkaProbeError: of one kind or another (see `cka_probe.errors`), where the caller can mend it.
    """
    check_extract_options(
        models, data=data, paired=paired, views=views, examples=examples, batch_size=batch_size, pool=pool, seed=seed,
        workers=workers, split=split, data_dir=data_dir, download=download, image_size=image_size, mean=mean, std=std,
        checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    examples, batch_size, seed = int(examples), int(batch_size), int(seed)  # NumPy's go into no record
    world = world or World(device_named(device))
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    folder.check_origin(overwrite=overwrite, writes=FILES)
    with folder if world.writes and folder is not out else nullcontext():
        if world.writes:
            if overwrite:
                given = list(models.values()) if isinstance(models, Mapping) else models
                folder.check_inputs(input_paths(given, data, paired))
            folder.claim("extract", resume=resume, overwrite=overwrite, writes=FILES)
        patterns = parse_patterns(layers)
        saved = Partial(folder, "extract", {"what": "extract", "seed": seed}, resume=resume, minutes=checkpoint_minutes)
        samples, found = examples_and_subjects(
            models, data=data, paired=paired, views=views, examples=examples, seed=seed, split=split,
            data_dir=data_dir, download=download, image_size=image_size, mean=mean, std=std, world=world,
        )  # fmt: skip
        subjects = [subject for subject in found if isinstance(subject, Subject)]
        if len(subjects) < len(found):
            raise SpecError("Features are extracted from networks, but some of these are stored features already.")
        used = min(batch_count(len(samples), batch_size) * batch_size, len(samples))
        sha256 = identities_sha256(samples.source, samples.indices[:used])
        stems = file_names([subject.name for subject in subjects])
        names = {name: f"{stem}.safetensors" for name, stem in stems.items()}
        if world.writes:
            folder.check_free(names.values())
        with _Recorder(folder, names, used, {"sample_sha256": sha256, "pool": pool}, world) as recorder:
            _, _, examined = probe_layers(
                subjects, samples, recorder.start, patterns=patterns, batch_size=batch_size, pool=pool, amp=amp,
                where=world.device, seed=seed, workers=workers, progress=progress, world=world, partial=saved,
                merge_often=True,
            )  # fmt: skip
        if world.writes:
            for subject in examined["subjects"]:
                subject["file"] = names[subject["name"]]
            examined["data"]["sample_sha256"] = sha256
            with folder.together(RESULTS, replaces=(RESULTS, REPORT), kind="extract") as stage:
                for path in recorder.paths.values():
                    linked(path, stage / path.name)  # until all is in place, the run can be resumed
                with (stage / SAMPLES).open("w", encoding="utf-8") as file:
                    for position, index in enumerate(samples.indices[:used]):
                        file.write(("\n" if position else "") + quoted(samples.source.identity(int(index))))
                write_record(stage, {**(record or {}), "result": {**examined, "seed": seed, "versions": versions()}})
        return [folder.path / name for name in names.values()]


class _Recorder:
    """Takes the place of a measure in the probing loop, and writes what it is given.

    Args:
        folder: of the run.
        names: subject -> the name of its file.
        rows: examples that will come.
        metadata: for the files' headers.
        world: the processes of the run; rank 0 writes.

    Attributes:
        paths: subject -> its file, while the run is not finished.
    """

    def __init__(
        self, folder: RunFolder, names: Mapping[str, str], rows: int, metadata: Mapping[str, str], world: World
    ) -> None:
        self._folder, self._names, self._world = folder, names, world
        self.paths: dict[str, Path] = {}
        self._sent: dict[int, dict[int, Tensor]] = {}  # of a process that does not write: layer -> first -> features
        self._rows = rows
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

    def start(self, labels: Sequence[Layer]) -> dict[str, _Recorder]:
        self._labels = labels
        return {"features": self}

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
            raise CheckpointError(f"{folder / missing[0]} was begun, but is not there. Start anew with --overwrite.")
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
