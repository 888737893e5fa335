"""The cost model: what it says of small comparisons on this machine, beside the truth; and of large ones elsewhere.

    python benchmarks/cost_model.py [--out benchmarks/cost_model.csv]

The three parts of a comparison (forward passes, Gram matrices, all pairs of layers) are each predicted from their
floating-point operations and the bytes they move, by
`cka_probe.probing.in_turn.cost.parts_of`, and a machine's rates: the slower of
the two rules. Here, the rates are measured: a large float32 product, a large float64 product and a copy. The parts are
measured too, on a batch of noise, in processor time, since other work on the machine does not count in that. Elsewhere,
the rates are those of a data sheet, and the prediction is what the hardware allows at best.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import timm
import torch
from torch import Tensor

from cka_probe.estimation.feature_store import FeatureStore, Scratch
from cka_probe.estimation.gram import Features
from cka_probe.estimation.measure import Setup
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source
from cka_probe.measures.linear_cka import LinearCKA
from cka_probe.networks.models import Subject
from cka_probe.probing.dry_runs import InputVariants, dry_runs
from cka_probe.probing.in_turn.cost import NetworkCost, Part, Work, parts_of, told_bytes
from cka_probe.probing.in_turn.ledger import count_operations
from cka_probe.probing.job import Job
from cka_probe.probing.options import Images, Measuring, Running
from cka_probe.runtime.world import World

SMALL = {
    "ResNet-18 and ViT-tiny, 96 px": (("resnet18", "vit_tiny_patch16_224"), 96, 64),
    "MobileNetV2 and ConvNeXt-atto, 96 px": (("mobilenetv2_100", "convnext_atto"), 96, 64),
    "six networks, 64 px": (
        ("resnet18", "vit_tiny_patch16_224", "mobilenetv2_100", "convnext_atto", "resnet34", "regnetx_004"), 64, 128
    ),
}  # fmt: skip
LARGE = ("resnet50", "vit_base_patch16_224")


@dataclass(frozen=True)
class Machine:
    """How fast it is, a second.

    Attributes:
        name: of the machine.
        products: operations of the networks and of the Gram matrices.
        pairs: operations of float64 products.
        bandwidth: bytes.
        activation: bytes of a value of an activation, 4 in float32.
    """

    name: str
    products: float
    pairs: float
    bandwidth: float
    activation: int = 4

    def seconds(self, parts: tuple[Part, ...]) -> list[float]:
        """Of each part."""
        forward, grams, pairs = parts
        narrow = 4 / self.activation * self.bandwidth  # the parts are counted in float32
        return [
            forward.seconds(self.products, narrow),
            grams.seconds(self.products, narrow),
            pairs.seconds(self.pairs, self.bandwidth),
        ]


# NVIDIA's data sheet, H100 SXM, dense: TF32 495, bfloat16 989, FP64 on tensor cores 67 TFLOP/s; 3.35 TB/s.
H100 = (
    Machine("H100, TF32", 495e12, 67e12, 3.35e12),
    Machine("H100, bfloat16", 989e12, 67e12, 3.35e12, activation=2),
)


def processor_seconds(run: Callable[[], object], least: float = 1.0) -> float:
    """Of one call, the shortest of several."""
    run()
    found, spent = [], 0.0
    while spent < least or len(found) < 3:
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
        spent += found[-1]
    return min(found)


def here() -> Machine:
    """The rates of this machine, with as many threads as PyTorch has."""
    single, double = torch.randn(2048, 2048), torch.randn(1024, 1024, dtype=torch.float64)
    copied, copy = torch.randn(1 << 25), torch.empty(1 << 25)
    float32 = 2 * 2048**3 / processor_seconds(lambda: single @ single)
    float64 = 2 * 1024**3 / processor_seconds(lambda: double @ double)
    bandwidth = 2 * copied.nbytes / processor_seconds(lambda: copy.copy_(copied))
    return Machine("here", float32, float64, bandwidth)


class Keeper:
    """Keeps the features of a batch, where a measure would make Gram matrices of them."""

    def __init__(self) -> None:
        self.features: dict[int, Tensor] = {}

    def prepare(self, layer: int, features: Features) -> None:
        self.features[layer] = features.x


@torch.no_grad()
def take_apart(names: tuple[str, ...], size: int, n: int, *, measured: bool) -> tuple[list[NetworkCost], list[float]]:
    """What networks with random weights take on a batch of noise, and the seconds of the three parts of a batch."""
    networks = [
        timm.create_model(name, **({"img_size": size} if name.startswith("vit") else {})).eval() for name in names
    ]
    subjects = [Subject(name, network) for name, network in zip(names, networks, strict=True)]
    noise = torch.randn(n, 3, size, size)
    job = Job(images=Images(), features=Measuring(), running=Running(), world=World(torch.device("cpu")))
    found = dry_runs(subjects, InputVariants.of(subjects, sample(open_source(noise), n, 0)), job)
    costs, features = [], []
    for name, probe in zip(names, found.probes(subjects, [keeper := Keeper()], job), strict=True):
        operations = count_operations(lambda probe=probe: probe.subject.network(noise[:2]))
        keeper.features.clear()
        probe.run(noise)
        features += keeper.features.values()
        widths = [x.shape[1] for x in keeper.features.values()]
        weights = sum(parameter.nbytes for parameter in probe.subject.network.parameters())
        costs.append(NetworkCost(name, weights, 0, operations.flops / 2, operations.moved / 2, widths))
    if not measured:
        return costs, []
    labels = [str(label) for label in found.labels]
    measure = LinearCKA().start(Setup(labels, labels, FeatureStore(labels, n, Scratch())))
    grams = [Features(x).gram for x in features]
    return costs, [
        processor_seconds(lambda: [network(noise) for network in networks]),
        processor_seconds(lambda: [Features(x).gram for x in features]),
        processor_seconds(lambda: measure.add(grams, 0)),
    ]


def small() -> pd.DataFrame:
    """The parts of a batch on this machine: predicted and measured."""
    machine, rows = here(), []
    for case, (names, size, n) in SMALL.items():
        costs, seconds = take_apart(names, size, n, measured=True)
        parts = parts_of(costs, Work(n, n, sum(len(cost.widths) for cost in costs)))
        for part, predicted, took in zip(parts, machine.seconds(parts), seconds, strict=True):
            share = took / sum(seconds)
            rows.append({
                "case": case, "part": part.name, "GFLOP": part.flops / 1e9, "GB": part.moved / 1e9,
                "seconds": took, "share of time": share, "predicted / measured": predicted / took,
            })  # fmt: skip
        rows.append({
            "case": case, "part": "all", "seconds": sum(seconds), "share of time": 1.0,
            "predicted / measured": sum(machine.seconds(parts)) / sum(seconds),
        })  # fmt: skip
    print(f"here: {machine}")
    return pd.DataFrame(rows)


def large() -> pd.DataFrame:
    """ImageNet-1k's validation images on one GPU, and 1.3 million on eight."""
    costs, _ = take_apart(LARGE, 224, 8, measured=False)
    rows = []
    for examples, gpus in ((50_000, 1), (1_300_000, 8)):
        work = Work(examples, 256, sum(len(cost.widths) for cost in costs))
        parts = parts_of(costs, work)
        for machine in H100:
            for part, seconds in zip(parts, machine.seconds(parts), strict=True):
                rows.append({
                    "images": examples, "machine": f"{gpus} x {machine.name}", "part": part.name,
                    "PFLOP": part.flops / 1e15, "TB": part.moved / 1e12, "seconds at best": seconds / gpus,
                })  # fmt: skip
        print(f"{examples} images: Gram matrices in a file {told_bytes(work.kept_bytes)}, sums {work.sums}")
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    out = parser.parse_args().out
    for table, path in ((large(), out.with_name(f"{out.stem}_large.csv")), (small(), out)):
        print(table.to_string(index=False, float_format="{:.3g}".format), flush=True)
        table.to_csv(path, index=False, float_format="%.3g")


if __name__ == "__main__":
    main()
