"""The files of a distillation. Those of the outcome appear together, run.yaml last."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor

from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.methods import METHODS
from cka_probe.distill.outputs.words import WORDS
from cka_probe.distill.subjects import Examined, parameters
from cka_probe.networks.models import Subject
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.folder.run_folder import RECORD, REPORT, RESULTS, RunFolder
from cka_probe.runtime.provenance import versions
from cka_probe.runtime.world import World

Row = Mapping[str, Any]
"""Of metrics.csv: column -> value."""

STUDENT, CONFIG, METRICS, STAGES = "student.safetensors", "config.json", "metrics.csv", "stages.yaml"
BEST = "best.safetensors"

FILES = (
    RECORD,
    STUDENT,
    BEST,
    CONFIG,
    METRICS,
    STAGES,
    WORDS,
    *(f"similarity.{when}.npz" for when in ("before", "choice", "after")),
    *(f"similarity.{name}.npz" for method in METHODS.values() for name in method.networks),
)
"""What a distillation writes, its pictures and report aside."""


def write_similarity(folder: RunFolder, when: str, similarity: Similarity) -> None:
    """Write similarity.WHEN.npz; ``when`` may be the name of a further network too."""
    folder.put(f"similarity.{when}.npz", similarity.save)


def stage_first(stage: Path, stages: Mapping[str, Any] | None, similarity: Similarity | None) -> None:
    """Write stages.yaml and similarity.before.npz, of which a method may have none, into a folder."""
    if stages is not None:
        _write_yaml(stage / STAGES, stages)
    if similarity is not None:
        similarity.save(stage / "similarity.before.npz")


def write_metrics(folder: RunFolder, rows: Sequence[Row]) -> None:
    """Write metrics.csv, a row an epoch; a part of the loss that joined later is empty before."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    folder.put(METRICS, lambda path: path.write_text(text.getvalue(), encoding="utf-8"))


def write_stages(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Write stages.yaml: the scores of the stages, the choice, the reasons."""
    folder.put(STAGES, lambda path: _write_yaml(path, record))


def write_outcome(
    folder: RunFolder,
    record: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
) -> None:
    """Write the student and the record of the finished run, together.

    Beside the weights stands config.json. If timm can make the network by its name,
    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the student.

    Args:
        folder: of the run.
        record: command, options and result.
        states: weights by the file they go into: those of the last epoch, and those of the best.
        config: of `cka_probe.distill.outputs.export.model_config`.
    """
    from safetensors.torch import save

    with folder.together(RESULTS, replaces=(REPORT,), kind="distill") as stage:
        for file, state in states.items():
            # save_file() makes files that their owner alone can read.
            (stage / file).write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))
        (stage / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        _write_yaml(stage / RECORD, record)


def result(taught: Accuracy | None, student: Subject, teacher: Examined | None, world: World) -> dict[str, Any]:
    """What run.yaml says of the outcome, beside the accuracy of the student.

    Args:
        taught: accuracy of the teacher on the test images.
        student: itself.
        teacher: itself.
        world: the processes.
    """
    return {
        "teacher_top1": taught.top1 if taught else None,
        "student": _described(student),
        "teacher": _described(teacher.subject) if teacher else None,
        "processes": world.size,
        "device": str(world.device),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _described(subject: Subject) -> dict[str, Any]:
    size = list(subject.preprocessing.size)
    return {"name": subject.name, **subject.source, "parameters": parameters(subject.network), "sees": size}


def _write_yaml(path: Path, record: Mapping[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(_plain(record), sort_keys=False, allow_unicode=True, width=120)
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Mappings and sequences as YAML knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
