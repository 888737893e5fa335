"""What ``--teacher-cache`` saves: training images per second without it, while it is filled, and when it is there.

    python benchmarks/teacher_cache.py [--teacher SPEC] [--student SPEC] [--data DATA] [--out FILE]

Each row is the median over the epochs of one run of ``kd``; the three runs follow one another in one process, and their
weights must be equal bit for bit. The ratio is to the run without a cache. One thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from cka_probe.distill.config import Training
from cka_probe.distill.methods.kd import KD
from cka_probe.distill.recipes import recipe, with_options
from cka_probe.distill.training.train import distill

EPOCHS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="zoo:cnn")
    parser.add_argument("--student", default="zoo:mlp@random")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, weights = [], []
    with TemporaryDirectory() as folder:
        for name, cache in (("without", None), ("filled", "cache"), ("there", "cache")):
            options = {**recipe("digits"), "data": arguments.data, "epochs": EPOCHS, "warmup_epochs": 1, "workers": 0}
            config = with_options(
                Training(student=arguments.student, teacher=arguments.teacher, method=KD()),
                {**options, "method": "kd", "device": "cpu", "teacher_cache": cache and f"{folder}/{cache}"},
            )
            done = distill(config, Path(folder) / name)
            rates = [row["images_per_second"] for row in done.metrics]
            rows.append({"cache": name, "images_per_second": round(median(rates), 1)})
            weights.append((Path(folder) / name / "student.safetensors").read_bytes())
    table = pd.DataFrame(rows)
    table["ratio"] = (table.images_per_second / table.images_per_second[0]).round(2)
    table.insert(0, "pair", f"{arguments.teacher} -> {arguments.student} on {arguments.data}")
    table.to_csv(arguments.out, index=False)
    print(table.to_string(index=False))
    return int(len(set(weights)) > 1)


if __name__ == "__main__":
    sys.exit(main())
