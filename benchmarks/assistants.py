"""FBT's assistant for pairs of timm families: one training step on random weights, or why the pair is refused.

    python benchmarks/assistants.py [--out benchmarks/assistants.csv]

Each row holds which network comes first, the stages behind which the two are cut, the parameters of L2G, and what the
step came to: whether all parts of the loss and all gradients are finite, whether the first layer of the student gets a
gradient from the assistant's losses alone, and whether the teacher is what it was, bit for bit. A pair that is in the
table already is left out, so that a run that was cut off goes on. One thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import nn

from cka_probe.activations.taps import Taps, changed_in_place
from cka_probe.distill.config import Training
from cka_probe.distill.methods.fbt import FBT
from cka_probe.distill.methods.loss import Setting
from cka_probe.distill.probe import setting_with
from cka_probe.distill.subjects import examine, load, with_classes
from cka_probe.distill.training.learner import Learner
from cka_probe.errors import CkaProbeError

CLASSES, IMAGES = 10, 4

PAIRS = (  # teacher, student: those of the issue first, a pair of each kind
    ("vit_small_patch16_224", "resnet18"),
    ("mixer_s32_224", "mobilenetv2_100"),
    ("convnext_tiny", "deit_tiny_patch16_224"),
    ("convnext_tiny", "resmlp_12_224"),
    ("mixer_s32_224", "deit_tiny_patch16_224"),
    ("swin_tiny_patch4_window7_224", "resnet18"),
    ("convnext_tiny", "swin_tiny_patch4_window7_224"),
    ("poolformer_s12", "resnet18"),
    ("deit_tiny_distilled_patch16_224", "convnext_atto"),
    ("resnet50", "resnet18"),
    ("pvt_v2_b0", "efficientnet_b0"),
    ("xcit_nano_12_p16_224", "ghostnet_100"),
    ("maxvit_pico_rw_256", "vgg11_bn"),
    ("mobilevit_xs", "regnetx_002"),
    ("inception_v3", "vit_tiny_patch16_224"),
    ("densenet121", "mixer_s32_224"),
    ("crossvit_tiny_240", "mobilenetv3_small_100"),
    ("tnt_s_legacy_patch16_224", "resnet18"),
    ("levit_128s", "repvgg_a0"),
    ("caformer_s18", "convmixer_768_32"),
    ("tf_efficientnet_lite0", "vit_tiny_patch16_224"),
    ("vit_tiny_patch16_224", "tf_efficientnet_lite0"),
    ("beit_base_patch16_224", "resnet18"),
    ("eva02_tiny_patch14_224", "resnet18"),
    ("hiera_tiny_224", "resnet18"),
    ("twins_svt_small", "resnet18"),
    ("gmlp_s16_224", "resnet18"),
    ("nextvit_small", "resnet18"),
    ("focalnet_tiny_srf", "deit_tiny_patch16_224"),
    ("edgenext_xx_small", "resmlp_12_224"),
    ("resnet18", "efficientformer_l1"),
    ("resnet18", "davit_tiny"),
    ("resnet18", "vit_tiny_patch16_224"),
    ("vit_tiny_patch16_224", "mixer_s32_224"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = pd.read_csv(out, keep_default_na=False).to_dict("records") if out.is_file() else []
    done = {(row["teacher"], row["student"]) for row in rows}
    for teacher, student in PAIRS:
        if (teacher, student) in done:
            continue
        rows.append({"teacher": teacher, "student": student, **examined(teacher, student)})
        print(*rows[-1].values(), sep=" | ", flush=True)
        pd.DataFrame(rows).to_csv(out, index=False)
    trained = sum(row["outcome"] == "trained" for row in rows)
    refused = sum(row["outcome"] == "refused" for row in rows)
    print(f"timm {timm.__version__}: of {len(rows)} pairs {trained} are trained and {refused} refused -> {out}")
    return int(trained + refused < len(rows))


def examined(teacher: str, student: str) -> dict[str, Any]:
    """A row: what a step came to, or why there is none."""
    row: dict[str, Any] = dict.fromkeys(("first", "student_stage", "teacher_stage", "l2g_parameters", "reason"), "")
    try:
        return row | step(teacher, student)
    except CkaProbeError as error:
        return row | {"outcome": "refused", "reason": " ".join(str(error).split())}


def step(teacher_name: str, student_name: str) -> dict[str, Any]:
    """One training step of FBT with its default options on noise."""
    method, device = FBT(), torch.device("cpu")
    teacher, student = (
        examine(with_classes(load(f"{name}@random", role, None), CLASSES, 0), "stages", device)
        for name, role in ((teacher_name, "Teacher"), (student_name, "Student"))
    )
    network, frozen = student.subject.network, teacher.subject.network
    frozen.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    config = Training(student=student_name, teacher=teacher_name, method=method)
    decision = method.decide(student, teacher, config, None, CLASSES)
    loss = method.build(setting_with(Setting(config, CLASSES, 100, student.side, teacher.side), decision))
    images, seen = (
        torch.rand(IMAGES, *side.side.input_size, generator=torch.Generator().manual_seed(1))
        for side in (student, teacher)
    )
    learner = Learner(network, loss, copies=changed_in_place(network, student.side.stages, images[:2])).train()
    taps = Taps(frozen, loss.teacher_layers, classes=CLASSES)
    if changed_in_place(frozen, loss.teacher_layers, seen[:2]):
        taps.keep_copies()
    with torch.no_grad():
        logits, taken = taps.run(seen)
    taught = loss.of_teacher(taken)
    parts = learner(images, torch.arange(IMAGES) % CLASSES, torch.arange(IMAGES), logits, taught)
    sum(value for name, value in parts.items() if name.startswith("teacher_assistant")).backward(retain_graph=True)
    through = next(iter(network.parameters())).grad is not None
    torch.stack(list(parts.values())).sum().backward()
    return {
        "first": decision.record["first"],
        "student_stage": decision.record["pairs"][0][0],
        "teacher_stage": decision.record["pairs"][0][1],
        "l2g_parameters": sum(weight.numel() for weight in loss.trained["l2g"].parameters()),
        "outcome": "trained" if _finite(parts, learner) and _equal(before, frozen) else "failed",
        "reaches_student": ("first layer" if through else "tail alone"),
    }


def _finite(parts: Mapping[str, torch.Tensor], learner: nn.Module) -> bool:
    gradients = [weight.grad for weight in learner.parameters() if weight.grad is not None]
    return all(bool(tensor.isfinite().all()) for tensor in (*parts.values(), *gradients))


def _equal(before: Mapping[str, torch.Tensor], network: nn.Module) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


if __name__ == "__main__":
    sys.exit(main())
