"""What stands beside an exported student: config.json, in timm's format."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from cka_probe.images.preprocessing import Preprocessing
from cka_probe.networks.models import Subject
from cka_probe.networks.specs import ModelSpec
from cka_probe.runtime.user_files import is_user_file

logger = logging.getLogger(__name__)

_ORIGIN = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "license", "description", "origin_url",
    "paper_name", "paper_ids", "notes",
)  # fmt: skip
"""Of timm's ``pretrained_cfg``, what is true of the pretrained weights and of no others."""


def model_config(student: Subject, classes: Sequence[str] | None) -> dict[str, Any]:
    """The config.json of a student: how it sees images, its classes and, where timm can make it, how.

    It is made before the training, so that nothing in it can fail after it.

    Args:
        student: the network with its classifier, and how it sees images.
        classes: their names; None where the classifier stays as it is.

    Returns:
        What timm writes of a network that it made; of any other the same without ``architecture``.
    """
    data = _data_config(student.preprocessing)
    config = _of_timm(student.network, data, classes)
    if config is None:
        logger.info("timm does not know the student's architecture: its config.json holds classes and preprocessing.")
        count = {"num_classes": len(classes)} if classes is not None else {}
        config = {**count, **_names(classes), "pretrained_cfg": {**data, **count}}
    if not _from_pretrained(student):
        config["pretrained_cfg"] = {k: v for k, v in config["pretrained_cfg"].items() if k not in _ORIGIN}
    plain_json: dict[str, Any] = json.loads(json.dumps(config))
    return plain_json


def _data_config(seen: Preprocessing) -> dict[str, Any]:
    return {
        "input_size": seen.size,
        "mean": seen.mean,
        "std": seen.std,
        "interpolation": seen.interpolation,
        "crop_pct": seen.crop_pct,
        "crop_mode": seen.crop_mode,
    }


def _names(classes: Sequence[str] | None) -> dict[str, Any]:
    return {"label_names": list(classes)} if classes is not None else {}


def _of_timm(network: nn.Module, data: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, Any] | None:
    """What timm writes of a network that it made; None of any other."""
    from timm.models import is_model
    from timm.models._hub import save_config_for_hf

    own: Any = getattr(network, "pretrained_cfg", None)
    architecture = own.get("architecture") if isinstance(own, Mapping) else None
    if not architecture or not is_model(architecture):
        return None
    with TemporaryDirectory() as aside:
        path = Path(aside) / "config.json"
        try:
            save_config_for_hf(network, str(path), model_config=_names(classes), data_config=dict(data))
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # of a network that its owner changed, timm's inspection may raise anything
            logger.warning("timm cannot describe the student, so that its config.json names no architecture: %s", error)
            return None
    return config


def _from_pretrained(student: Subject) -> bool:
    """Whether the student started from the weights that timm's configuration of it describes."""
    spec = str(student.source.get("spec", ""))
    parsed = ModelSpec.parse(spec) if spec else None
    if parsed is None or parsed.weights is not None or parsed.folder is not None:
        return False
    return not (parsed.base.startswith("zoo:") or is_user_file(parsed.base))
