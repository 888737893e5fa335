"""Images a second of the whole training loop over those of the bare step, on the same machine.

    python benchmarks/distill_throughput.py [--student SPEC] [--teacher SPEC] [--data DATA] [--method ofa] ...

The bare step is what cannot be left out: teacher forward without autograd, student and branches forward and backward,
the optimizer, over and over on one batch that lies on the device. The loop is `distill`'s own, as it tells its images a
second: it adds reading, augmentation, mixing, the schedule, sums of the losses and the looks at them; evaluation and
checkpoints, once an epoch, are left out. The two are timed in turn, and the best of a few rounds is taken of each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cka_probe.distill.config import Training
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.distill.preparation import Prepared, prepare
from cka_probe.distill.recipes import recipe, with_options
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.runtime.randomness import keeping_random_state
from cka_probe.runtime.world import joined


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
    parser.add_argument("--out", type=Path, help="a CSV file; the row is put into it")
    arguments = parser.parse_args()
    names = ("student", "teacher", "data", "method", "batch_size", "workers", "device")
    options = recipe(arguments.recipe) | {name: getattr(arguments, name) for name in names}
    config = with_options(Training(student=arguments.student), options)
    with joined(config.device) as world, keeping_random_state():
        ready = prepare(config, world)
        step = TrainingStep(ready, config, world)
        chooses = isinstance(config.method, StageChoice) and ready.teacher is not None
        step.equip(
            config.method.decide(ready.student, ready.teacher, config, None, ready.setting.classes) if chooses else None
        )
        loop, bare = [], []
        for _ in range(arguments.rounds):
            loop.append(_loop(config))
            bare.append(_bare(step, ready, config))
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


def _loop(config: Training) -> float:
    """The faster of the two epochs of a training; the first batch comes while the workers start, and is timed too."""
    with tempfile.TemporaryDirectory() as folder:
        done = distill(replace(config, epochs=2, warmup_epochs=0), Path(folder) / "run")
    return max(float(row["images_per_second"]) for row in done.metrics)


def _bare(step: TrainingStep, ready: Prepared, config: Training) -> float:
    """As many steps as an epoch has, on one resident batch."""
    device = next(step.network.parameters()).device
    batch = next(iter(ready.images.epoch(0))).to(device)
    images, for_teacher, target = ready.views(batch)
    teacher_images = for_teacher()
    step.learner.train()
    started = time.perf_counter()
    for _ in range(ready.images.steps):
        logits, taken = step.teach(lambda: teacher_images)
        torch.stack(list(step.learner(images, target, batch.indices, logits, taken).values())).sum().backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(step.learner.parameters(), config.clip)
        step.optimizer.step()
        step.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return ready.images.steps * config.batch_size / (time.perf_counter() - started)


def _add(path: Path, row: dict[str, Any]) -> None:
    """Put the row into the table, in place of one of the same setting."""
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(row))
    same = (rows[list(row)[:6]].astype(str) == [str(value) for value in list(row.values())[:6]]).all(axis=1)
    pd.concat([rows[~same], pd.DataFrame([row])]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
