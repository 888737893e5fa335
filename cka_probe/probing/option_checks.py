"""What model specs, data specs and views must be, as far as it can be checked before images or networks are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cka_probe.errors import SpecError
from cka_probe.runtime.paths import existing_file, existing_folder, usable_path
from cka_probe.runtime.ranges import check_choice, shown


def check_report_options(folder: Any, before: Any, after: Any, out: Any) -> None:
    """Raise a SpecError where the command ``report`` is given too much, too little, or a folder that is not there."""
    change = (before, after)
    if (folder is None) == (change == (None, None)) or (folder is None and None in (*change, out)):
        raise SpecError(
            "report takes the folder of a run, or two of them to compare: cka-probe report --before RUN --after RUN "
            "--out DIR."
        )
    for what, path in (("report", folder), ("--before", before), ("--after", after)):
        if path is not None:
            existing_folder(path, what)


def check_models(models: Any) -> None:
    """Raise where a model spec is wrong in itself, or names a file that is not there. Other models are passed over."""
    from cka_probe.networks.specs import check_spec
    from cka_probe.probing.stored_features import is_stored, stored_path

    for spec in _specs(models):
        usable_path(spec, "A model spec")
        if is_stored(spec):
            if not stored_path(spec).exists():
                raise SpecError(f"The features {stored_path(spec)} do not exist.")
        else:
            check_spec(spec)


def input_paths(specs: Sequence[Any], *others: Any) -> list[Path]:
    """The files and folders that model specs and other options name, there or not; anything but texts is passed over.

    Args:
        specs: of models.
        others: data specs and paths; None for none.
    """
    from cka_probe.images.sources.source import folder_path
    from cka_probe.networks.specs import ModelSpec
    from cka_probe.probing.stored_features import is_stored, stored_path
    from cka_probe.runtime.user_files import is_user_file

    found = [Path(folder_path(str(other))[1]) for other in others if isinstance(other, (str, Path))]
    for spec in (str(spec) for spec in specs if isinstance(spec, (str, Path)) and str(spec)):
        if is_stored(spec):
            found.append(stored_path(spec))
            continue
        parsed = ModelSpec.parse(spec)
        found += [Path(parsed.weights)] if parsed.weights and parsed.seed is None else []
        found += [Path(parsed.base.rpartition(":")[0])] if is_user_file(parsed.base) else []
        found += [parsed.folder] if parsed.folder is not None else []
    return found


def check_names(models: Any) -> None:
    """Raise a SpecError where two model specs name the same model."""
    from cka_probe.networks.specs import ModelSpec
    from cka_probe.probing.stored_features import is_stored

    if isinstance(models, Mapping):
        return
    seen: dict[str, str] = {}
    for spec in _specs(models):
        name = "" if is_stored(spec) else ModelSpec.parse(spec).name
        if name and name in seen:
            raise SpecError(
                f"Two models would both be called {name!r}. Give them names: first={seen[name]} second={spec}"
            )
        seen[name] = spec


def _specs(models: Any) -> list[str]:
    """The specs among the models that a caller names."""
    given = [models] if isinstance(models, (str, Path)) else models
    given = list(given.values()) if isinstance(given, Mapping) else given
    if isinstance(given, Sequence) and not given:
        raise SpecError("Give at least one model, such as resnet18 or zoo:cnn.")
    return [str(model) for model in given if isinstance(model, (str, Path))] if isinstance(given, Sequence) else []


def check_data(data: Any, data_dir: Any, *, download: bool = False, what: str = "--data") -> None:
    """Raise a SpecError where a data spec names no data set, and no folder that is there."""
    from cka_probe.images.sources.datasets import DATASET_PREFIXES
    from cka_probe.images.sources.source import folder_path

    if data_dir is not None:
        usable_path(data_dir, "--data-dir")
    if not isinstance(data, (str, Path)):
        return
    prefixed, text = folder_path(str(data))
    if text.startswith("torch/") and not prefixed:  # the others may have a place of their own
        if data_dir is None:
            raise SpecError(f"{what} {text} needs the folder of the data set: --data-dir DIR.")
        if not download:
            existing_folder(data_dir, "--data-dir")
    if not prefixed and (text == "digits" or text.startswith(DATASET_PREFIXES)):
        return
    path = usable_path(text, what)
    if not prefixed and not path.exists() and "/" not in text:
        raise SpecError(
            f"{what} must be digits, a folder of images, or a data set such as torch/cifar100, but there is no folder "
            f"{text!r}."
        )
    existing_folder(path, what)


def check_options_of_data(data: Any, data_dir: Any, split: Any, *, download: bool) -> None:
    """Raise a SpecError where the options of a data set are given for other data, or the digits have no such split."""
    from cka_probe.images.sources.datasets import DATASET_PREFIXES
    from cka_probe.images.sources.folder import SPLITS

    of_timm = not isinstance(data, (str, Path)) or str(data).startswith(DATASET_PREFIXES)
    if (data_dir is not None or download) and not of_timm:
        raise SpecError(
            f"--data-dir and --download are for data sets ({', '.join(DATASET_PREFIXES)}), but the data are "
            f"{shown(str(data))}."
        )
    if isinstance(data, str) and data == "digits":
        check_choice("split", split, (None, *SPLITS["train"], *SPLITS["validation"]))


def check_views(views: Any) -> None:
    """Raise a SpecError where a view is none."""
    from cka_probe.images.views import parse_views
    from cka_probe.runtime.user_files import is_user_file

    given = [part.strip() for part in views.split(",") if part.strip()] if isinstance(views, str) else list(views)
    own = [view for view in given if isinstance(view, str) and is_user_file(view)]
    for view in own:  # it is imported later, and once
        existing_file(view.rpartition(":")[0], view)
    if len(own) < len(given) or not given:
        parse_views([view for view in given if view not in own])
