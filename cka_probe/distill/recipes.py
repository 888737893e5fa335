"""Options from elsewhere: the recipes of the package, and the records of earlier runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from cka_probe.distill.config import COMMON, Training, as_record, from_record, methods_with, renewed
from cka_probe.errors import SpecError
from cka_probe.runtime.paths import usable_path


def recipe(name: str) -> dict[str, Any]:
    """The values that a recipe of the package presets.

    Raises:
        SpecError: there is no such recipe.

    >>> recipe("cifar-token")["mixup"]
    0.8
    """
    import yaml

    folder = resources.files("cka_probe.distill") / "recipes"
    known = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    if name not in known:
        raise SpecError(f"--recipe must be one of {', '.join(known)}, but got {name!r}.")
    return dict(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))


def recorded(path: str | Path) -> dict[str, Any]:
    """The options that a run.yaml of distill holds.

    Raises:
        SpecError: it is no such file.
    """
    import yaml

    path = usable_path(path, "--config")
    if not os.path.exists(path):
        raise SpecError(f"The file {path} does not exist (--config).")
    path = path / "run.yaml" if path.is_dir() else path
    try:
        if not path.is_file():
            raise OSError("it is no regular file" if path.exists() else "it does not exist")
        options = yaml.safe_load(path.read_text(encoding="utf-8"))["options"]
        # A run of version 0.1 knew no validation images: it was trained on all images.
        return {"validation": 0, **{str(name): value for name, value in dict(options).items()}}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"--config must be the run.yaml of a distillation, but {path} is not: {reason}") from error


def with_options(config: Training, options: Mapping[str, Any]) -> Training:
    """The config with some values replaced, lists as the tuples that they were.

    Options of other methods than the chosen one are passed over: a recipe or a record may hold them. Where another
    method is chosen, those of the one before are dropped, as it may have other defaults.

    Raises:
        SpecError: an option is not known.
    """
    options = renewed(options)
    unknown = sorted(name for name in options if name not in COMMON and not methods_with(name))
    if unknown:
        raise SpecError(f"There are no such options: {', '.join(unknown)}. See cka-probe distill --help.")
    before = as_record(config)
    if options.get("method", before["method"]) != before["method"]:  # one method's values are no other's defaults
        before = {name: value for name, value in before.items() if name in COMMON}
    return from_record({**before, **options})
