"""The scoreboard: runs the benchmarks, one after the other, and writes what they found to RESULTS.md.

    python benchmarks/scoreboard.py                 # all that a CPU can do: three quarters of an hour on two cores
    python benchmarks/scoreboard.py --only processes overhead
    python benchmarks/scoreboard.py --only          # RESULTS.md again, from the tables that are there

Each benchmark keeps its own table (a .csv file beside it), and each can be run by itself; RESULTS.md shows all tables
that are there, and when each was made. Times are ratios within one run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import yaml

FOLDER = Path(__file__).resolve().parent
STAMPS = FOLDER / "results.yaml"


@dataclass(frozen=True)
class Benchmark:
    """One script, its table, and how to read the table.

    Attributes:
        script: with its arguments.
        table: its CSV file.
        title: of the section.
        text: below it.
        by_default: whether it is run where none is named.
    """

    script: str
    table: str
    title: str
    text: str
    by_default: bool = True


BENCHMARKS = {
    "overhead": Benchmark(
        "compare_overhead.py --rounds 1", "compare_overhead.csv", "What a comparison costs, and how exact it is",
        "Time of a whole comparison over that of the bare forward passes, and the largest error against float64; peak "
        "memory of two ResNet-18 at 96 px beyond the process, over that of 512 images, the blocks and batches of 64.",
    ),
    "gpu": Benchmark(
        "gpu_overhead.py", "gpu_overhead.csv", "The same on a GPU",
        "ResNet-50 and ViT-B/16, batches of 256 at 224 px: time of a batch over that of the bare forward passes, with "
        "the reading of the images left out.", by_default=False,
    ),
    "tensor-cores": Benchmark(
        "tensor_cores.py", "tensor_cores.csv", "What tensor cores do to the numbers",
        "Imitated on a CPU: largest and mean error of CKA against float64, all pairs of layers.",
    ),
    "processes": Benchmark(
        "processes.py", "processes.csv", "Two processes beside one", "Time over that of one process, a thread each.",
    ),
    "plan": Benchmark(
        "plan_accuracy.py", "plan_accuracy.csv", "The memory that --memory plans, and what a run takes",
        "Planned over measured peak memory.",
    ),
    "distill": Benchmark(
        "distill_throughput.py --out benchmarks/distill_throughput.csv", "distill_throughput.csv",
        "Distillation", "Images a second of the whole training loop over those of the bare step.",
    ),
    "collected": Benchmark(
        "collected_memory.py --out benchmarks/collected_memory.csv", "collected_memory.csv",
        "Measures that need all images at once", "Peak memory of 10,000 examples; an hour or more.", by_default=False,
    ),
    "coverage": Benchmark(
        "intervals.py --out benchmarks/intervals.csv", "intervals.csv", "Coverage of nominal 95% intervals",
        "From independent samples of known populations; hours.", by_default=False,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(BENCHMARKS), help="which; none: RESULTS.md alone")
    default = [name for name, benchmark in BENCHMARKS.items() if benchmark.by_default]
    chosen = parser.parse_args().only
    stamps = yaml.safe_load(STAMPS.read_text(encoding="utf-8")) if STAMPS.exists() else {}
    for name in default if chosen is None else chosen:
        print(f"== {name}: {BENCHMARKS[name].script}", flush=True)
        script, *arguments = BENCHMARKS[name].script.split()
        subprocess.run([sys.executable, str(FOLDER / script), *arguments], check=True, cwd=FOLDER.parent)
        stamps[name] = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "commit": commit(), **machine()}
        STAMPS.write_text(yaml.safe_dump(stamps, sort_keys=True), encoding="utf-8")
        write(stamps)
    write(stamps)
    print(f"Results: {FOLDER / 'RESULTS.md'}")


def write(stamps: dict[str, dict[str, str]]) -> None:
    """RESULTS.md, from the tables that are there."""
    parts = ["# Results", "", "    python benchmarks/scoreboard.py", ""]
    for name, benchmark in BENCHMARKS.items():
        table = FOLDER / benchmark.table
        if not table.exists():
            continue
        made = ", ".join(str(value) for value in stamps.get(name, {"": "date unknown"}).values())
        parts += [f"## {benchmark.title}", "", f"    python benchmarks/{benchmark.script}", ""]
        parts += [f"{benchmark.text} ({made}.)", ""]
        parts += [*markdown(pd.read_csv(table, dtype=str).fillna("")), ""]
    (FOLDER / "RESULTS.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def markdown(table: pd.DataFrame) -> list[str]:
    """A table's lines; bare seconds are left out, as they say more of the machine."""
    bare = [name for name in table if name == "seconds" or name.endswith("_per_second")]
    shown = table.drop(columns=bare)
    rows = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    return [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import timm
    import torch

    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return {"machine": ", ".join([*gpu, cores]), "versions": versions}


def commit() -> str:
    """The commit that was measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FOLDER)
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no commit"


if __name__ == "__main__":
    main()
