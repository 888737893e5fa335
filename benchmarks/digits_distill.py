"""Distil the bundled CNN into small networks on the digits, several seeds a method; a row a run, and a table of means.

    python benchmarks/digits_distill.py --students vit --seeds 3 --epochs 25
    python benchmarks/digits_distill.py --students vit --seeds 5 --epochs 25      # runs in the file are not repeated

All arms of a student have the same recipe, epochs and seeds; what is reported is the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from cka_probe.distill.config import DistillConfig, recipe, with_options
from cka_probe.distill.train import distill

TEACHER = "zoo:cnn"
STUDENTS = {
    "vit": "vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=48,depth=6,num_heads=3,num_classes=10"
    "@random:{seed}",
    "mlp": "zoo:mlp@random:{seed}",
}
ARMS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "kd": {"method": "kd"},
    "fitnet": {"method": "fitnet"},
    "ofa all": {"method": "ofa", "stages": "all"},
    "ofa auto": {"method": "ofa", "stages": "auto", "probe_epochs": 3},
}
COLUMNS = ("student", "arm", "seed", "epochs", "top1", "stages", "branch_parameters", "seconds")
HERE = Path(__file__).resolve().parent.parent / "reports" / "digits-distill"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--seeds", type=int, default=3, help="1 to so many")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of runs.csv and README.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "runs.csv"
    rows = _read(path)
    done = {(row["student"], row["arm"], int(row["seed"]), int(row["epochs"])) for row in rows}
    for seed in range(1, arguments.seeds + 1):
        for student in arguments.students:
            for arm in ARMS:
                if (student, arm, seed, arguments.epochs) in done:
                    continue
                rows.append(run(student, arm, seed, arguments.epochs))
                print(rows[-1], flush=True)
                _write(path, rows)
    (arguments.out / "README.md").write_text(report(rows, arguments.epochs), encoding="utf-8")


def run(student: str, arm: str, seed: int, epochs: int) -> dict[str, Any]:
    """One training; its row."""
    import yaml

    options = {**recipe("digits"), **ARMS[arm], "epochs": epochs, "seed": seed}
    config = with_options(
        DistillConfig(student=STUDENTS[student].format(seed=seed), teacher=None if arm == "none" else TEACHER), options
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = distill(config, out)
        record = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))["result"]
        stages = out / "stages.yaml"
        chosen = yaml.safe_load(stages.read_text(encoding="utf-8")) if stages.exists() else None
    ofa = chosen if arm.startswith("ofa") else None
    return {
        "student": student,
        "arm": arm,
        "seed": seed,
        "epochs": epochs,
        "top1": round(done.accuracy.top1, 5),
        "stages": " ".join(map(str, chosen["chosen"])) if chosen else "",
        "branch_parameters": ofa["parameters"]["chosen_branches"] if ofa else 0,
        "seconds": record["seconds"],
    }


def report(rows: list[dict[str, Any]], epochs: int) -> str:
    """Means over seeds with 95% intervals (Student's t), and of the differences to none seed by seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if int(row["epochs"]) == epochs:
            found[row["student"], row["arm"]][int(row["seed"])] = row
    seeds: dict[str, int] = {}
    for (student, _), runs in found.items():
        seeds[student] = max(seeds.get(student, 0), len(runs))
    lines = [
        "# The bundled CNN into small networks, on the digits",
        "",
        *(
            f"    python benchmarks/digits_distill.py --students {student} --seeds {count} --epochs {epochs}"
            for student, count in seeds.items()
        ),
        "",
        f"Teacher `{TEACHER}`; recipe `digits`; {epochs} epochs; top-1 in % of the 359 held-out digits after the last",
        "epoch. Mean over seeds ± half of the 95% interval (Student's t); gain over `none` paired by seed; seconds",
        "of a run on one core of a shared machine. [`runs.csv`](runs.csv) has every run.",
        "",
        "| student | method | seeds | top-1 | gain over none | branch parameters | stages chosen | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (student, arm), runs in found.items():
        base = found.get((student, "none"), {})
        top1 = [100 * float(row["top1"]) for row in runs.values()]
        gains = [100 * (float(row["top1"]) - float(base[seed]["top1"])) for seed, row in runs.items() if seed in base]
        stages = ", ".join(sorted({row["stages"].replace(" ", "+") for row in runs.values()}))
        branches = np.mean([float(row["branch_parameters"]) for row in runs.values()])
        seconds = np.mean([float(row["seconds"]) for row in runs.values()])
        gain = _interval(gains) if arm != "none" and gains else "–"
        lines.append(
            f"| {student} | {arm} | {len(runs)} | {_interval(top1)} | {gain} | {branches:,.0f} | {stages or '–'} "
            f"| {seconds:.0f} |"
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
