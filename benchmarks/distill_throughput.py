"""Images a second of the whole training loop over those of the bare step, on the same machine.

    python benchmarks/distill_throughput.py [--student SPEC] [--teacher SPEC] [--data DATA] [--method ofa] ...

The bare step is what cannot be left out: teacher forward without autograd, student and branches forward and backward,
the optimizer, over and over on one batch that lies on the device. The loop adds reading, augmentation, mixing, the
schedule, sums of the losses and the looks at them; evaluation and checkpoints, once an epoch, are left out of both.
The two are timed in turn, and the best of a few rounds is taken of each.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cka_probe.distill.config import DistillConfig, recipe, with_options
from cka_probe.distill.pipeline import keeping_random_state
from cka_probe.distill.train import _Training
from cka_probe.distill.world import joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="zoo:vit@random")
    parser.add_argument("--teacher", default="zoo:cnn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--method", default="ofa")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a CSV file; a row is added to it")
    arguments = parser.parse_args()
    names = ("student", "teacher", "data", "method", "batch_size", "workers", "device")
    options = recipe(arguments.recipe) | {name: getattr(arguments, name) for name in names}
    config = with_options(DistillConfig(student=arguments.student), options)
    with tempfile.TemporaryDirectory() as folder, joined(config.device) as world, keeping_random_state():
        training = _Training(config, Path(folder), world, None)
        if training.teacher is not None and config.method in ("ofa", "fitnet"):
            training._decide(None)
        training._equip()
        training._start_clock()
        loop, bare = [], []
        for _ in range(arguments.rounds):
            loop.append(_loop(training))
            bare.append(_bare(training))
    row = {
        **{name: getattr(arguments, name) for name in ("student", "teacher", "data", "method", "batch_size")},
        "device": str(world.device),
        "loop_images_per_second": round(max(loop), 1),
        "bare_images_per_second": round(max(bare), 1),
        "ratio": round(max(loop) / max(bare), 3),
    }
    print(row)
    if arguments.out:
        _add(arguments.out, row)


def _loop(training: _Training) -> float:
    """An epoch of the training; its first batch comes while the workers start, so it is timed too."""
    training.step = 0
    started = time.perf_counter()
    training._train_epoch()
    training._look()  # waits for the device
    return training.images.steps * training.config.batch_size / (time.perf_counter() - started)


def _bare(training: _Training) -> float:
    """As many steps on one resident batch."""
    config, learner = training.config, training.learner
    batch = next(iter(training.images.epoch(0))).to(training.world.device)
    images, teacher_images, target = training.views(batch)
    started = time.perf_counter()
    for _ in range(training.images.steps):
        logits, taken = training._taught(teacher_images)
        torch.stack(list(learner(images, target, batch.indices, logits, taken).values())).sum().backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(learner.parameters(), config.clip)
        training.optimizer.step()
        training.optimizer.zero_grad()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return training.images.steps * config.batch_size / (time.perf_counter() - started)


def _add(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


if __name__ == "__main__":
    main()
