"""Two processes beside one: how much sooner a comparison is done, and by how much its numbers differ.

    python benchmarks/processes.py [--out benchmarks/processes.csv]

Each process has one thread. The seconds are those that run.yaml tells, so that the start of Python does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

import cka_probe as cp

MODELS = ("resnet18@random", "deit_tiny_patch16_224,img_size=96@random")
OPTIONS = ("--data", "digits", "--image-size", "96", "--examples", "1024", "--batch-size", "64", "--device", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = {count: compared(count, Path(folder) / str(count)) for count in arguments.processes}
    seconds, values = found[arguments.processes[0]]
    for count, (own_seconds, own_values) in found.items():
        difference = f"{np.abs(own_values - values).max():.0e}"
        rows.append({"processes": count, "time": round(own_seconds / seconds, 2), "largest difference": difference})
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(arguments.out, index=False)


def compared(processes: int, out: Path) -> tuple[float, np.ndarray]:
    """The seconds of a comparison by so many processes, and its values."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *launcher, "-m", "cka_probe", "compare", *MODELS, *OPTIONS, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = yaml.safe_load((out / "run.yaml").read_text(encoding="utf-8"))
    similarity = cp.Similarity.load(out / "similarity.npz")
    return float(similarity.provenance.seconds or record["result"]["seconds"]), similarity.values


if __name__ == "__main__":
    main()
