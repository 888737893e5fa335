"""Two processes train as one does on batches of the same images: also where the loss relates images."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from cka_probe.distill.config import Training, as_record
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.methods.loss import MethodLoss, StepInputs
from cka_probe.distill.methods.rsd import RSD
from cka_probe.distill.training.train import distill
from tests.distill.conftest import spec

Options = Callable[..., Training]

PROGRAM = """
import sys
from pathlib import Path
import yaml
from cka_probe.distill.config import from_record
from cka_probe.distill.methods.loss import MethodLoss, StepInputs
from cka_probe.distill.methods.rsd import RSD
from cka_probe.distill.training.train import distill
for options in yaml.safe_load_all(Path(sys.argv[1]).read_text()):
    distill(from_record(options), Path(sys.argv[2]) / options["method"])
"""

RELATE = ("dist", "cc", "rkd", "crd", "fbt")


def on_two_processes(configs: list[Training], folder: Path) -> None:
    """Train one after the other, each into ``folder / method``."""
    (folder / "options.yaml").write_text(yaml.safe_dump_all(map(as_record, configs)))
    (folder / "program.py").write_text(PROGRAM)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(folder / "program.py"), str(folder / "options.yaml"), str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


def changed(**changes: Any) -> dict[str, Any]:
    """Layer norm, and nothing random in the forward pass; small steps, so that round-off does not grow."""
    plain = {"student": spec("plain_vit"), "epochs": 2, "optimizer": "sgd", "lr": 0.01, "warmup_epochs": 0}
    return {**plain, **changes}


@pytest.mark.full
def test_two_processes_relate_the_images_of_both(options: Options, tmp_path: Path) -> None:
    whole = {"fbt": {"teacher": spec("whole_teacher")}}
    configs = {method: changed(method=method, **whole.get(method, {})) for method in RELATE}
    on_two_processes([options(**config, batch_size=6) for config in configs.values()], tmp_path)
    for method, config in configs.items():
        alone = distill(options(**config, batch_size=12), tmp_path / "one" / method)
        one, two = (load_file(tmp_path / which / method / "student.safetensors") for which in ("one", ""))
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=f"{method}: {name}")
        record = yaml.safe_load((tmp_path / method / "run.yaml").read_text())
        assert record["result"]["processes"] == 2
        assert record["result"]["top1"] == alone.accuracy.top1


class OfEachHalf(RSD):
    """On one process, the mean of the losses of two with half of the batch each."""

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        half = len(seen.target) // 2
        losses = []
        for rows in (slice(half), slice(half, None)):
            taken, teacher_taken = ([layer[rows] for layer in layers] for layers in (seen.taken, seen.teacher_taken))
            tensors = {name: getattr(seen, name)[rows] for name in ("images", "target", "indices", "logits")}
            share = replace(seen, **tensors, taken=taken, teacher_taken=teacher_taken)
            losses.append(super().parts(loss, share))
        return {name: (losses[0][name] + losses[1][name]) / 2 for name in losses[0]}


@pytest.mark.full
def test_rsd_correlates_the_images_of_one_process(options: Options, tmp_path: Path) -> None:
    on_two_processes([options(**changed(method="rsd", batch_size=6))], tmp_path)
    alone = replace(options(**changed(method="rsd", batch_size=12)), method=OfEachHalf())
    distill(alone, tmp_path / "one")
    one, two = (load_file(tmp_path / which / "student.safetensors") for which in ("one", "rsd"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.full
def test_buffers_that_are_evaluated_are_those_that_are_exported(options: Options, tmp_path: Path) -> None:
    """Each process has its own running statistics; the student's accuracy is that of the file, on one process."""
    asked = changed(method="none", teacher=None, student=spec("tiny_cnn"), batch_size=6, ema=0.5, lr=0.1, epochs=3)
    on_two_processes([options(**asked)], tmp_path)
    result = yaml.safe_load((tmp_path / "none" / "run.yaml").read_text())["result"]
    weights = f"{spec('tiny_cnn')}@{tmp_path / 'none' / 'student.safetensors'}"
    assert evaluate(weights, data=options().data, workers=0).top1 == result["top1"]
