"""The files of a distillation: each appears whole or not at all, and run.yaml last."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cka_probe.distill.evaluation import Accuracy
from cka_probe.distill.subjects import Examined, parameters
from cka_probe.distill.tensorboard import clear_events
from cka_probe.errors import OutputError
from cka_probe.models import Preprocessing, Subject
from cka_probe.provenance import versions
from cka_probe.similarity import Similarity
from cka_probe.world import World

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
"""Of metrics.csv: column -> value."""

FILES = (
    "run.yaml",
    "student.safetensors",
    "config.json",
    "metrics.csv",
    "stages.yaml",
    "similarity.before.npz",
    "similarity.choice.npz",
    "similarity.after.npz",
    "last.ckpt",
    "previous.ckpt",
    "report.html",
    *(f"{picture}.{suffix}" for picture in ("curves", "cka") for suffix in ("png", "svg", "pdf")),
)


def clear(folder: Path) -> None:
    """Take away what an earlier distillation left, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    clear_events(folder)
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Take away files that a killed run was writing."""
    for name in FILES:
        for path in folder.glob(f".{name}-*"):
            path.unlink(missing_ok=True)


def write_similarity(folder: Path, when: str, similarity: Similarity) -> None:
    """Write similarity.WHEN.npz."""
    _whole(folder / f"similarity.{when}.npz", similarity.save)


def write_metrics(folder: Path, rows: Sequence[Row]) -> None:
    """Write metrics.csv, a row an epoch; a part of the loss that joined later is empty before."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    _whole(folder / "metrics.csv", lambda path: path.write_text(text.getvalue(), encoding="utf-8"))


def result(
    accuracy: Accuracy, taught: Accuracy | None, student: Subject, teacher: Examined | None, world: World
) -> dict[str, Any]:
    """What run.yaml says of the outcome.

    Args:
        accuracy: of the exported student.
        taught: of the teacher.
        student: itself.
        teacher: itself.
        world: the processes.
    """
    return {
        "top1": accuracy.top1,
        "top1_interval": list(accuracy.interval()),
        "top5": accuracy.top5,
        "held_out": accuracy.images,
        "teacher_top1": taught.top1 if taught else None,
        "student": _described(student),
        "teacher": _described(teacher.subject) if teacher else None,
        "processes": world.size,
        "device": str(world.device),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }


def write_yaml(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write a record as YAML."""
    import yaml

    text = yaml.safe_dump(_plain(record), sort_keys=False, allow_unicode=True, width=120)
    _whole(folder / name, lambda path: path.write_text(text, encoding="utf-8"))


def write_student(
    folder: Path, student: nn.Module, state: Mapping[str, Tensor], preprocessing: Preprocessing, classes: Sequence[str]
) -> bool:
    """Write student.safetensors, and timm's config.json where timm can make the network by its name.

    Args:
        folder: of the run.
        student: the network.
        state: its weights, or their average.
        preprocessing: how it saw images.
        classes: their names.

    Returns:
        Whether ``timm.create_model("local-dir:FOLDER", pretrained=True)`` will do.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _whole(folder / "student.safetensors", lambda path: path.write_bytes(save(tensors)))
    config = _timm_config(student, preprocessing, classes)
    if config is None:
        logger.info("timm does not know the student's architecture, so there is no config.json beside its weights.")
        return False
    _whole(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2), encoding="utf-8"))
    return True


def _timm_config(student: nn.Module, preprocessing: Preprocessing, classes: Sequence[str]) -> dict[str, Any] | None:
    """The config.json that timm writes of a network that it made itself; None for any other."""
    from tempfile import TemporaryDirectory

    from timm.models import is_model
    from timm.models._hub import save_config_for_hf

    own: Any = getattr(student, "pretrained_cfg", None)
    architecture = own.get("architecture") if isinstance(own, Mapping) else None
    if not architecture or not is_model(architecture):
        return None
    data = {
        "input_size": preprocessing.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
    }
    with TemporaryDirectory() as aside:
        path = Path(aside) / "config.json"
        save_config_for_hf(student, str(path), model_config={"label_names": list(classes)}, data_config=data)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _described(subject: Subject) -> dict[str, Any]:
    size = list(subject.preprocessing.size)
    return {"name": subject.name, **subject.source, "parameters": parameters(subject.network), "sees": size}


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside the path, then rename."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write(aside)
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
