"""The config.json beside weights, in timm's format: how the network sees images, its classes, its architecture."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from cka_probe.errors import CheckpointError
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.runtime.files import reason, require_regular
from cka_probe.runtime.ranges import IMAGE_SIZE
from cka_probe.runtime.records import Shape, misfit

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)  # a spec is checked, and then loaded

CONFIG = "config.json"

_PREPROCESSING: Shape = {
    "input_size?": [int, int, int], "mean?": ([float], None), "std?": ([float], None), "interpolation?": (str, None),
    "crop_pct?": (float, None), "crop_mode?": (str, None),
}  # fmt: skip
_WHOLE: Shape = {
    "architecture?": (str, None), "num_classes?": (int, None), "model_args?": ({}, None),
    "pretrained_cfg": _PREPROCESSING,
}  # fmt: skip
_CROP_MODES = ("center", "squash", "border")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


@dataclass(frozen=True)
class ModelConfig:
    """What a config.json says of the weights beside it.

    Attributes:
        path: of the file.
        architecture: timm's name of the network; None where timm has none.
        arguments: keyword arguments of the network, its number of classes apart.
        preprocessing: from an image to what the network sees.
        classes: their names, in the order of the logits; empty where unknown.
    """

    path: Path
    architecture: str | None
    preprocessing: Preprocessing
    arguments: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def read_model_config(folder: Path) -> ModelConfig | None:
    """The config.json of a folder; None where there is none, or one of another library, which is reported.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        require_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, reason(error)) from error
    whole = _as_timm_writes(content)
    if whole is None:
        warn_once("%s is not in timm's format (it has no pretrained_cfg) and is ignored.", path)
        return None
    problem = misfit(whole, _WHOLE, "the file") or _out_of_range(whole["pretrained_cfg"])
    if problem:
        raise _damaged(path, problem)
    pretrained = {name: value for name, value in whole["pretrained_cfg"].items() if value is not None}
    arguments = {name: value for name, value in (whole.get("model_args") or {}).items() if name != "num_classes"}
    names = whole.get("label_names") or pretrained.get("label_names")
    listed = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    return ModelConfig(path, whole.get("architecture"), Preprocessing.from_config(pretrained), arguments, tuple(listed))


def is_model_config(folder: Path) -> bool:
    """Whether a folder has a config.json in timm's format."""
    try:
        return _as_timm_writes(json.loads((folder / CONFIG).read_text(encoding="utf-8"))) is not None
    except (OSError, ValueError, RecursionError):
        return False


def _as_timm_writes(content: Any) -> dict[str, Any] | None:
    """The content of a config.json in timm's present format; None where it is of another library."""
    if not isinstance(content, dict):
        return None
    if "pretrained_cfg" in content:
        return content
    if "architecture" in content and "input_size" in content:  # as timm wrote it before 2023
        labels = content.get("label_names", content.get("labels"))
        return {"architecture": content["architecture"], "label_names": labels, "pretrained_cfg": content}
    return None


def _out_of_range(config: Mapping[str, Any]) -> str:
    """What is wrong with the numbers and names of a preprocessing; nothing where all are right."""
    channels, *size = config.get("input_size", (3, 1, 1))
    if channels < 1 or any(side not in IMAGE_SIZE for side in size):
        return f"input_size must be channels, height and width, but is {config['input_size']}"
    for name in ("mean", "std"):
        values = config.get(name)
        if values is not None and len(values) not in (1, 3, channels):
            return f"{name} must hold a number for each of the {channels} channels, but is {values}"
    if any(value <= 0 for value in config.get("std") or ()):
        return f"std must hold numbers above 0, but is {config['std']}"
    crop = config.get("crop_pct")
    if crop is not None and not 0 < crop <= 2:
        return f"crop_pct must be a share above 0, but is {crop}"
    for name, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        value = config.get(name)
        if value is not None and value not in known:
            return f"{name} must be one of {', '.join(known)}, but is {value!r}"
    return ""


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} says how the network beside it sees images, but cannot be used: {why}. Restore it, or rename it and "
        "give the preprocessing by --image-size, --mean and --std."
    )
