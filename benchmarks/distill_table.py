"""Distillation methods side by side, several seeds a method: a row a run, and a table of means with intervals.

    python benchmarks/distill_table.py digits --seeds 5
    python benchmarks/distill_table.py cifar100-cpu --data CIFAR100 --seeds 1
    python benchmarks/distill_table.py cifar100-gpu --data torch/cifar100 --data-dir DIR --seeds 3

Studies:
    digits        the bundled CNN into a small ViT, and the bundled ViT into a small CNN; minutes a run on a core
    cifar100-cpu  a narrow ResNet-18, trained here, into a small ViT, a few epochs: an hour on a core
    cifar100-gpu  a ResNet-18 into DeiT-tiny and ResMLP-12, and that DeiT into a narrow ResNet-18, 32 px, 100 epochs

All methods of a student have the same recipe, epochs and seeds; what is reported is the last epoch. A study can be cut
off: a run that is in runs.csv is not repeated, and one that was under way goes on from its checkpoint (in --work).
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t

from cka_probe.distill.config import Training
from cka_probe.distill.recipes import recipe, with_options
from cka_probe.distill.training.train import distill

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = "benchmarks/networks.py"
RESNET = f"{NETWORKS}:resnet18"
ARMS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "kd": {"method": "kd"},
    "fitnet": {"method": "fitnet"},
    "ofa all": {"method": "ofa", "stages": "all"},
    "ofa auto": {"method": "ofa", "stages": "auto"},
    "rsd": {"method": "rsd"},
    "fbt": {"method": "fbt"},
    "fbt without teacher to assistant": {"method": "fbt", "teacher_assistant_weight": 0.0},
}
COLUMNS = ("student", "arm", "seed", "epochs", "top1", "stages", "branch_parameters", "assistant_top1", "seconds")


@dataclass(frozen=True)
class Student:
    """A student of a study.

    Attributes:
        spec: with {seed}.
        teacher: a spec, or the name of one of the study's teachers.
        recipe: by name.
        options: that differ from it.
    """

    spec: str
    teacher: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Students, the teachers that are trained for them first, and what all runs share."""

    title: str
    students: dict[str, Student]
    options: dict[str, Any]
    teachers: dict[str, Student] = field(default_factory=dict)


_SHORT = {"warmup_epochs": 1, "lr": 1e-3, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": None}
_DEIT = "deit_tiny_patch16_224,img_size=32,patch_size=4,num_classes=100@random:{seed}"
STUDIES = {
    "digits": Study(
        "The bundled CNN into a small ViT, and the bundled ViT into a small CNN, on the digits",
        {
            "vit": Student(
                "vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=48,depth=6,num_heads=3,num_classes=10"
                "@random:{seed}",
                "zoo:cnn",
                "digits",
            ),
            "cnn": Student(f"{NETWORKS}:narrow_resnet@random:{{seed}}", "zoo:vit", "digits"),
        },
        {"data": "digits", "epochs": 20, "probe_epochs": 3, "validation": 0},
    ),
    "cifar100-cpu": Study(
        "A narrow ResNet-18 into a small ViT, on CIFAR-100, a few epochs",
        {
            "vit": Student(
                "vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=64,depth=6,num_heads=4,num_classes=100"
                "@random:{seed}",
                "cnn",
                "cifar-token",
                _SHORT,
            )
        },
        {"data": "torch/cifar100", "epochs": 3},
        {"cnn": Student(f"{RESNET},width=16,stride=2@random:{{seed}}", "", "cifar-cnn", {"epochs": 10})},
    ),
    "cifar100-gpu": Study(
        "Across families on CIFAR-100 at 32 px",
        {
            "deit": Student(_DEIT, "cnn", "cifar-token"),
            "resmlp": Student(f"{NETWORKS}:resmlp12@random:{{seed}}", "cnn", "cifar-token"),
            "cnn": Student(f"{RESNET},width=32@random:{{seed}}", "deit", "cifar-cnn"),
        },
        {"data": "torch/cifar100", "epochs": 100, "bf16": True, "probe_epochs": 5},
        {
            "cnn": Student(
                f"{RESNET}@random:{{seed}}", "", "cifar-cnn", {"epochs": 100, "weight_decay": 5e-4, "lr": 0.1}
            ),
            "deit": Student(_DEIT, "", "cifar-token", {"epochs": 200}),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--students", nargs="+", help="all by default")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="1 to so many")
    parser.add_argument("--data", help="as for cka-probe distill, such as a folder with CIFAR-100")
    parser.add_argument("--data-dir", help="where a data set such as torch/cifar100 lies")
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="folder of checkpoints and teachers")
    parser.add_argument("--out", type=Path, help="folder of runs.csv and README.md; by default reports/STUDY-distill")
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    out = arguments.out or ROOT / "reports" / f"{arguments.study}-distill"
    work = arguments.work / f"table-{arguments.study}"
    out.mkdir(parents=True, exist_ok=True)
    epochs = str(study.options["epochs"])  # what was run with others, before the study was changed, is run again
    rows = [row for row in _read(out / "runs.csv") if row["student"] not in study.students or row["epochs"] == epochs]
    done = {(row["student"], row["arm"], int(row["seed"])) for row in rows}
    place = {"data": arguments.data, "data_dir": arguments.data_dir}
    shared = {**study.options, **{name: value for name, value in place.items() if value}}
    todo = [
        (name, arm, seed)
        for seed in range(1, arguments.seeds + 1)
        for name in arguments.students or study.students
        for arm in arguments.arms
        if (name, arm, seed) not in done
    ]
    teachers: dict[str, str] = {}
    for name, arm, seed in todo:
        student = study.students[name]
        teacher = student.teacher
        if teacher in study.teachers:
            if teacher not in teachers:
                teachers[teacher] = _trained(teacher, study.teachers[teacher], shared, work, rows, out)
            teacher = teachers[teacher]
        row, _ = run(student, teacher, arm, seed, shared, work / f"{name}-{arm.replace(' ', '-')}-{seed}")
        _keep({"student": name, "arm": arm, **row}, rows, out)
        shutil.rmtree(work / f"{name}-{arm.replace(' ', '-')}-{seed}")
    (out / "README.md").write_text(report(arguments.study, study, rows), encoding="utf-8")


def run(
    student: Student, teacher: str, arm: str, seed: int, shared: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], str]:
    """One training, or the rest of one; its row, and the spec of the trained network."""
    options = {**recipe(student.recipe), **shared, **student.options, **ARMS[arm], "seed": seed}
    spec = student.spec.format(seed=seed)
    config = with_options(Training(student=spec, teacher=None if arm == "none" else teacher), options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    finished = distill(config, folder, resume=folder.exists())
    record = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["result"]
    stages = folder / "stages.yaml"
    chosen = yaml.safe_load(stages.read_text(encoding="utf-8")) if stages.exists() else None
    row = {
        "seed": seed,
        "epochs": config.epochs,
        "top1": round(finished.accuracy.top1, 5),
        "stages": " ".join(map(str, chosen["chosen"])) if chosen else "",
        "branch_parameters": chosen["parameters"]["chosen_branches"] if chosen and arm.startswith("ofa") else 0,
        "assistant_top1": round(finished.metrics[-1].get("test_top1_assistant", math.nan), 5) if "fbt" in arm else "",
        "seconds": record["seconds"],
    }
    return row, f"{spec.partition('@')[0]}@{folder / 'student.safetensors'}"


def _trained(
    name: str, teacher: Student, shared: dict[str, Any], work: Path, rows: list[dict[str, Any]], out: Path
) -> str:
    """The spec of a teacher of the study's own, trained unless it is there."""
    folder = work / f"teacher-{name}"
    spec = f"{teacher.spec.partition('@')[0]}@{folder / 'student.safetensors'}"
    if not (folder / "run.yaml").exists():
        row, _ = run(teacher, "", "none", 0, shared, folder)
        _keep({"student": f"teacher {name}", "arm": "none", **row}, rows, out)
    return spec


def _keep(row: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    print(row, flush=True)
    rows.append(row)
    _write(out / "runs.csv", rows)


def report(name: str, study: Study, rows: list[dict[str, Any]]) -> str:
    """Means over seeds with 95% intervals (Student's t), and of the differences to none seed by seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["student"], row["arm"]][int(row["seed"])] = row
    seeds = max((len(runs) for (student, _), runs in found.items() if student in study.students), default=0)
    place = " --data CIFAR100" if study.options["data"] != "digits" else ""
    lines = [
        f"# {study.title}",
        "",
        f"    python benchmarks/distill_table.py {name}{place} --seeds {seeds}",
        "",
        "Top-1 in % of the test images after the last epoch: the mean over seeds ± half of the 95% interval",
        "(Student's t); gain over `none` paired by seed; the top-1 of FBT's assistant; median seconds of a run on",
        "a shared machine. [`runs.csv`](runs.csv) has every run, and the script every option.",
        "",
        "| student | method | seeds | epochs | top-1 | gain over none | assistant | branch parameters | stages "
        "| seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (student, arm), runs in found.items():
        base = found.get((student, "none"), {})
        top1 = [100 * float(row["top1"]) for row in runs.values()]
        gains = [100 * (float(row["top1"]) - float(base[seed]["top1"])) for seed, row in runs.items() if seed in base]
        stages = ", ".join(sorted({row["stages"].replace(" ", "+") for row in runs.values()}))
        branches = np.mean([float(row["branch_parameters"]) for row in runs.values()])
        seconds = np.median([float(row["seconds"]) for row in runs.values()])
        epochs = ", ".join(sorted({str(row["epochs"]) for row in runs.values()}))
        assistants = [100 * float(row["assistant_top1"]) for row in runs.values() if row["assistant_top1"] != ""]
        gain = _interval(gains) if arm != "none" and gains else "–"
        lines.append(
            f"| {student} | {arm} | {len(runs)} | {epochs} | {_interval(top1)} | {gain} "
            f"| {_interval(assistants) if assistants else '–'} | {branches:,.0f} | {stages or '–'} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _interval(values: list[float]) -> str:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return f"{mean:.2f}"
    reach = float(t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return f"{mean:.2f} ± {reach:.2f}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
