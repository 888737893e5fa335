"""What a collected measure takes: time and peak memory on random features, a process a measure.

    OMP_NUM_THREADS=1 python benchmarks/collected_memory.py --out benchmarks/collected_memory.csv

Two subjects of 12 layers each, 10,000 examples; the features of the second are those of the first, with noise. As a
comparison without further options: values, errors, control, and for Mantel its 999 permutations.
"""

from __future__ import annotations

import argparse
import csv
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from cka_probe.estimation.gram import Features
from cka_probe.measures.catalogue import MEASURES
from cka_probe.probing.measuring import start_measures
from cka_probe.probing.options import Measuring
from cka_probe.results.similarity import Layer

COLUMNS = ("measure", "examples", "layers", "width", "seconds", "peak_GiB")
BATCH = 500


def run(measure: str, examples: int, layers: int, width: int) -> None:
    """Measure in this process, and print a row."""
    labels = [Layer(subject, str(index)) for subject in ("first", "second") for index in range(layers)]
    (running,) = start_measures(labels, examples, Measuring(measures=measure)).values()
    generator = torch.Generator().manual_seed(0)
    for start in range(0, examples, BATCH):
        for index in range(layers):
            x = torch.randn(BATCH, width, generator=generator)
            running.prepare(index, Features(x))
            running.prepare(layers + index, Features(x + torch.randn(BATCH, width, generator=generator)))
        running.update(start)
    started = time.perf_counter()
    running.compute()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(",".join(map(str, (measure, examples, 2 * layers, width, round(seconds), round(peak, 2)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", default=",".join(name for name in MEASURES if not name.startswith("cka")))
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--one", help="measure this one in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        run(options.one, options.examples, options.layers, options.width)
        return
    rows = []
    for name in options.measures.split(","):
        command = [sys.executable, __file__, "--one", name]
        sizes = [f"--{what}={getattr(options, what)}" for what in ("examples", "layers", "width")]
        done = subprocess.run([*command, *sizes], check=True, capture_output=True, text=True)
        rows.append(done.stdout.strip().split(","))
        print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
        if options.out:
            with options.out.open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
