"""Which images of a data spec `evaluate` measures: all of a folder, but the test part alone for a run's own student."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cka_probe.distill.options import Evaluation
from cka_probe.errors import CkaProbeError, DataError, SpecError
from cka_probe.images.broken import BrokenImage, Search, without
from cka_probe.images.parts import Parts, fingerprint, open_parts
from cka_probe.images.sources.datasets import DATASET_PREFIXES
from cka_probe.images.sources.files import subfolders
from cka_probe.images.sources.folder import SPLITS, Folder, class_folders
from cka_probe.images.sources.source import ImageSource, folder_path
from cka_probe.networks.folders import folder_named
from cka_probe.networks.specs import ModelSpec
from cka_probe.probing.stored_features import is_stored
from cka_probe.runtime.folder.run_folder import RECORD
from cka_probe.runtime.records import read_mapping
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

LEARNT = ("knn", "linear")
"""Ways of ``--by`` that learn from training images."""

_EVALUATED = ("test", *(name for name in SPLITS["validation"] if name != "test"))
"""Folders that are measured in place of the one that holds them, the first that is there."""


@dataclass(frozen=True)
class EvaluatedImages:
    """What is measured.

    Attributes:
        images: each with its label.
        classes: names, in the order of the labels.
        part: which part of the data they are, for a reader.
        broken: images that are left out, as they cannot be read.
        train: the training images of the same data; None where all images are measured.
    """

    images: ImageSource
    classes: tuple[str, ...]
    part: str
    broken: tuple[BrokenImage, ...] = ()
    train: ImageSource | None = None


def evaluated_images(specs: Sequence[str], options: Evaluation, world: World) -> EvaluatedImages:
    """The images on which all of the networks are measured.

    Args:
        specs: of the networks. Where a run trained one of them on this folder, all are measured on its test images.
        options: the data.
        world: the processes that share the search for broken images.

    Raises:
        SpecError: the data spec names nothing, or two runs have different test parts.
        DataError: images or class folders are missing.
    """
    prefixed, text = folder_path(str(options.data))
    if not prefixed and (text == "digits" or text.startswith(DATASET_PREFIXES)):
        parts = _parts(options)
        found = EvaluatedImages(_test_part(parts), parts.classes, "test", train=parts.train)
    else:
        found = _of_runs(specs, options, Path(text)) or _of_folder(Path(text), options)
    if len(found.classes) < 2:
        raise DataError(f"{found.images.name} must hold at least 2 classes, but holds {len(found.classes)}.")
    if not options.skip_broken:
        return found
    broken, train = _broken(found.images, options, world), found.train
    images = without(found.images, broken)
    in_training: tuple[BrokenImage, ...] = ()
    if train is not None and options.by in LEARNT:
        in_training = _broken(train, options, world)
        train = without(train, in_training)
    return replace(found, images=images, broken=(*broken, *in_training), train=train)


def _broken(images: ImageSource, options: Evaluation, world: World) -> tuple[BrokenImage, ...]:
    return Search(world, options.workers)([images], np.arange(len(images)))


def warn_if_untrained(specs: Sequence[str]) -> None:
    """Say which of the networks are students of runs without labels: their classifiers have learned nothing."""
    for spec in specs:
        run = _beside(spec)
        result = _recorded(run).get("result") if run is not None else None
        if isinstance(result, Mapping) and "knn" in result:
            logger.warning(
                "%s was trained without labels, and its classifier not at all. Score its features: --by knn.", spec
            )


def _of_folder(root: Path, options: Evaluation) -> EvaluatedImages:
    """All images of a folder of class folders, or those of its part ``test`` or ``val``.

    Where training images are needed too, the parts as a training cuts them.
    """
    if not root.is_dir():
        raise SpecError(f"The folder {root} does not exist (--data).")
    if options.by in LEARNT:
        cut = _parts(options)
        return EvaluatedImages(_test_part(cut), cut.classes, "test", train=cut.train)
    parts = _part_folders(root)
    name = next((name for name in (*_EVALUATED, *SPLITS["train"]) if name in parts), None)
    folder = root if name is None else root / name
    train = next((root / name for name in SPLITS["train"] if name in parts), folder)
    classes, own = class_folders(train), class_folders(folder)
    odd = sorted(set(own) - set(classes))
    if odd:
        raise DataError(f"{folder} must hold no other class folders than {train}, but holds {', '.join(odd[:5])} too.")
    return EvaluatedImages(Folder(folder, classes, full_scale=options.full_scale), classes, name or "all images")


def _part_folders(root: Path) -> set[str]:
    """The names of the folders that are parts, and no classes: they hold folders themselves.

    Beside folders of other names, only where one of them is ``train``.
    """
    names = {*SPLITS["train"], *SPLITS["validation"]}
    inside = {name for name in names if (root / name).is_dir() and subfolders(root / name)}
    alone = set(class_folders(root)) <= names
    return inside if alone or inside & set(SPLITS["train"]) else set()


def _of_runs(specs: Sequence[str], options: Evaluation, root: Path) -> EvaluatedImages | None:
    """The test part of the runs that trained one of the networks on this folder; None where none did."""
    found: dict[str, tuple[Path, Parts]] = {}
    for run in dict.fromkeys(filter(None, map(_beside, specs))):
        recorded = _options_of(run)
        if _is_same(recorded.get("data"), root, run):
            parts = _parts(options, recorded)
            found[fingerprint(_test_part(parts))] = run, parts
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(str(run) for run, _ in found.values())
        raise SpecError(f"The runs {names} have different test images of {root}. Evaluate each network by itself.")
    ((run, parts),) = found.values()
    return EvaluatedImages(_test_part(parts), parts.classes, f"test images of {run}", train=parts.train)


def _beside(spec: str) -> Path | None:
    """The folder of the weights that a model spec names, where a record lies beside them."""
    if is_stored(spec):
        return None
    parsed = ModelSpec.parse(spec)
    folder = folder_named(parsed.base)
    if folder is None and parsed.weights is not None and parsed.seed is None:
        folder = Path(parsed.weights).parent
    return folder if folder is not None and (folder / RECORD).is_file() else None


def _options_of(run: Path) -> Mapping[str, Any]:
    """The recorded options of a distillation; nothing where the record is of something else."""
    options = _recorded(run).get("options")
    return options if isinstance(options, Mapping) and "student" in options else {}


def _recorded(run: Path) -> Mapping[str, Any]:
    """The record of a run; nothing where it cannot be read."""
    try:
        return read_mapping(run / RECORD)
    except CkaProbeError:
        return {}


def _is_same(recorded: Any, root: Path, run: Path) -> bool:
    """Whether the data of a run are a folder; a relative path may start here, or at a folder above the run."""
    if not isinstance(recorded, str):
        return False
    path = folder_path(recorded)[1]
    candidates = (Path(path), *(above / path for above in run.resolve().parents))
    return any(one.is_dir() and os.path.samefile(one, root) for one in candidates)


def _parts(options: Evaluation, run: Mapping[str, Any] | None = None) -> Parts:
    """The parts of the data as a training cuts them, with the options of a run where it was one."""
    return open_parts(
        options.data, validation=float((run or {}).get("validation", 0)), seed=int((run or {}).get("seed", 0)),
        data_dir=options.data_dir, download=options.download, full_scale=options.full_scale,
    )  # fmt: skip


def _test_part(parts: Parts) -> ImageSource:
    return parts.test
