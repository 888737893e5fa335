"""What pretraining without labels brings on the digits: the kNN accuracy of an OBoW student, and of its start.

A random network with batch norms in evaluation mode has not seen the data at all, so there are two controls: the random
weights as they are, and the same weights with the statistics of the data, by a run whose learning rate is nothing.

    python benchmarks/obow_digits.py --out benchmarks/obow_digits.csv
"""

from __future__ import annotations

import argparse
import csv
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cka_probe as cp

EPOCHS = {"zoo:cnn": 20, "zoo:vit": 10}
COLUMNS = ("student", "seed", "weights", "epochs", "images", "knn", "low", "high")


def main() -> None:
    """Train and score every network with every seed; a row is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--students", nargs="+", default=list(EPOCHS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for student in arguments.students:
            for seed in range(arguments.seeds):
                for row in rows(student, seed):
                    table.writerow(row)
                    file.flush()


def rows(student: str, seed: int) -> list[dict[str, Any]]:
    """The two controls and the trained student."""
    network = f"{student}@random:{seed}"
    found = [{"weights": "random", "epochs": 0, **score(network)}]
    for weights, epochs, lr in (("random, statistics of the data", 2, 1e-12), ("obow", EPOCHS[student], 2e-3)):
        with TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            cp.distill(
                student=network, data="digits", method=cp.OBoW(score_every=EPOCHS[student]), out=out, seed=seed,
                epochs=epochs, lr=lr, min_lr=min(lr, 1e-5), warmup_epochs=epochs / 10, batch_size=64, flip=0.0,
                validation=0, workers=0, device="cpu",
            )  # fmt: skip
            found.append({"weights": weights, "epochs": epochs, **score(f"{student}@{out / 'student.safetensors'}")})
    return [{"student": student, "seed": seed, **row} for row in found]


def score(spec: str) -> dict[str, Any]:
    """KNN accuracy on the test images, by the 20 nearest training images."""
    known = cp.evaluate(spec, data="digits", by="knn", workers=0, device="cpu")
    low, high = known.accuracy.interval()
    share = {"knn": known.top1, "low": low, "high": high}
    return {"images": known.accuracy.images, **{name: round(value, 4) for name, value in share.items()}}


if __name__ == "__main__":
    main()
