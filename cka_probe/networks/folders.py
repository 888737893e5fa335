"""A folder as a model spec: that of a distillation, or one with a timm config.json and weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cka_probe.errors import OutputError, SpecError
from cka_probe.networks.config import CONFIG, ModelConfig, is_model_config, read_model_config, warn_once
from cka_probe.runtime.folder.run_folder import RECORD, kind_of
from cka_probe.runtime.records import misfit, read_mapping
from cka_probe.runtime.user_files import code_sha256, is_user_file

WEIGHTS = ("student.safetensors", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""The exported weights of a folder, the first that is there."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin")
_ELSEWHERE = ("zoo:", "hf-hub:", "hf_hub:")
_STUDENT = {"student": {"spec": str, "network?": str, "code_sha256?": str}}


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says of its network.

    Attributes:
        path: of the folder.
        network: the spec that builds the network, without weights.
        weights: the file.
        config: size, mean, classes and the like; None where no config.json says them.
        size: (channels, height, width) of its images, where only the record of the run says it.
    """

    path: Path
    network: str
    weights: Path
    config: ModelConfig | None
    size: tuple[int, int, int] | None = None


def folder_named(base: str) -> Path | None:
    """The folder that a model spec names, there or not; None for a spec of another kind.

    Args:
        base: the spec without name, options and weights.
    """
    if base.startswith("local-dir:"):
        return Path(os.path.expanduser(base.removeprefix("local-dir:")))
    if base.startswith(_ELSEWHERE) or is_user_file(base):
        return None
    path = Path(os.path.expanduser(base))
    return path if base.startswith((".", "~")) or os.sep in base or holds_model(path) else None


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a distillation, finished or not, or a timm config.json."""
    if not os.path.isdir(folder):
        return False
    return is_model_config(folder) or _kind(folder) == "distill"


def read_folder(folder: Path, weights: str | None = None) -> ModelFolder:
    """What a folder says of its network.

    Args:
        folder: as `folder_named` gives it.
        weights: another file of that folder; its exported weights where None.

    Raises:
        SpecError: it is no such folder, or the code of its network is not there.
        CheckpointError: its config.json is damaged.
        OutputError: its run.yaml is damaged.
    """
    _check_there(folder)
    kind = _kind(folder)
    record = _student(folder) if kind == "distill" else {}
    config = read_model_config(folder)
    if kind == "distill" and not record:
        raise SpecError(
            f"The distillation in {folder} is not finished, so that it has no student yet. Finish it: cka-probe "
            f"distill --resume --out {folder}"
        )
    if not record and (config is None or config.architecture is None):
        held = f"the results of {kind}" if kind else "no run.yaml of a distillation and no config.json of timm's"
        raise SpecError(
            f"A folder that names a model must be that of a distillation, or hold a timm config.json and weights, but "
            f"{folder} holds {held}."
        )
    file = _weights_in(folder, weights)
    timms = config is not None and config.architecture is not None
    recorded = str(record.get("network") or record.get("spec") or "")
    if timms and not (recorded.startswith("zoo:") or is_user_file(_base(recorded))):
        assert config is not None
        return ModelFolder(folder, str(config.architecture), file, config)
    network = _built_by(folder, record)
    sees: Any = record.get("sees")
    size = None if misfit(sees, [int, int, int]) else (sees[0], sees[1], sees[2])
    return ModelFolder(folder, network, file, config, size)


def _check_there(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    if not os.path.exists(folder):
        raise SpecError(
            f"The folder {folder} does not exist. A model spec with a / is a folder; a model of the Hub is "
            "hf-hub:ORG/NAME, a network of your own file.py:factory."
        )
    if folder.suffix == ".py":
        raise SpecError(f"Which function of {folder} makes the network? Write {folder}:NAME.")
    raise SpecError(f"{folder} is a file. A checkpoint needs the network that it is of: MODEL@{folder}")


def _kind(folder: Path) -> str | None:
    """The kind of run that a folder holds, by its manifest or, without one, by its record; None where it is no run."""
    kind = kind_of(folder)
    if kind is not None or not (folder / RECORD).is_file():
        return kind
    try:
        record = read_mapping(folder / RECORD)
    except OutputError:
        return None
    options, result = record.get("options"), record.get("result")
    if isinstance(options, dict) and {"student", "method"} <= options.keys() and isinstance(result, dict):
        return "distill"
    return "another run" if isinstance(result, dict) else None


def _student(folder: Path) -> dict[str, Any]:
    """What the run.yaml of a distillation says of the student; nothing where it is not finished."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    record = read_mapping(path)
    problem = misfit(record.get("result"), _STUDENT, "result")
    if problem:
        raise OutputError(f"{path} is not as cka-probe wrote it: {problem}.")
    student: dict[str, Any] = record["result"]["student"]
    return student


def _weights_in(folder: Path, name: str | None) -> Path:
    if name is not None:
        found = [path for path in (folder / os.path.expanduser(name), Path(os.path.expanduser(name))) if path.exists()]
        if found:
            return found[0]
        raise SpecError(f"{folder} holds no file {name}. Its weights: {_listed(folder)}.")
    known = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if known is not None:
        return known
    others = _files_of_weights(folder)
    if len(others) == 1:
        return folder / others[0]
    if not others:
        raise SpecError(
            f"{folder} holds no weights: {WEIGHTS[0]} (of a distillation) or {WEIGHTS[1]} (of timm) must be beside "
            f"its {CONFIG if (folder / CONFIG).is_file() else RECORD}."
        )
    raise SpecError(f"{folder} holds several files of weights. Name one, {folder}@FILE: {_listed(folder)}.")


def _files_of_weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def _listed(folder: Path) -> str:
    return ", ".join(_files_of_weights(folder)) or "none"


def _built_by(folder: Path, record: dict[str, Any]) -> str:
    """The spec that builds the network of a finished distillation, its file where it is now."""
    specs = [str(record[name]) for name in ("network", "spec") if record.get(name)]
    if not is_user_file(_base(specs[0])):
        return specs[0].partition("@")[0]
    for spec in specs:
        base = _base(spec)
        if is_user_file(base) and os.path.isfile(os.path.expanduser(base.rpartition(":")[0])):
            if record.get("code_sha256") not in (None, code_sha256(base)):
                warn_once("%s has changed since the network in %s was trained.", base.rpartition(":")[0], folder)
            return spec.partition("@")[0]
    base = _base(specs[-1])
    raise SpecError(
        f"The network in {folder} is built by {base}, but that file does not exist here. Name where it is now: "
        f"PATH/{Path(base).name}@{folder / WEIGHTS[0]}"
    )


def _base(spec: str) -> str:
    """A recorded spec without options and weights."""
    return spec.partition("@")[0].partition(",")[0]
