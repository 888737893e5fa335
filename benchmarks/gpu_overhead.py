"""What a comparison costs on a GPU beyond running the networks, with reading and copying the images left out.

    python benchmarks/gpu_overhead.py [--batch-size 256] [--out benchmarks/gpu_overhead.csv]

ResNet-50 and ViT-B/16 with random weights at 224 px see one batch of smooth noise again and again, from pinned memory.
A batch's time is the difference between a run of 14 batches and one of 2, over 12: what a run does once (a dry run, the
hooks, the result) cancels. `forward` runs the networks alone on the same batch, copied each time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cka_probe as cp
from cka_probe.probing import batch_loop

FEW, MANY = 2, 14
CASES = [("blocks", "cka", True), ("blocks", "cka", False), ("all", "cka", True), ("all", "cka", False)]
CASES += [("blocks", "cka-rbf", True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    coarse = torch.randn(arguments.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(coarse, size=224, mode="bicubic").pin_memory()
    torch.manual_seed(0)
    # A residual branch whose last norm starts at 0 would make the layers of a stage equal.
    networks = [timm.create_model("resnet50", zero_init_last=False), timm.create_model("vit_base_patch16_224")]
    networks = [network.eval().cuda() for network in networks]
    rows = []
    for layers, measure, amp in CASES:
        alone = a_batch(lambda count, amp=amp: forward(networks, images, count, amp))
        compared = a_batch(
            lambda count, layers=layers, measure=measure, amp=amp: compare(
                networks, images, count, layers=layers, measures=measure, amp=amp
            )
        )
        rows.append(
            {
                "layers": layers,
                "measure": measure,
                "precision": "bfloat16" if amp else "float32",
                "time / forward": round(compared / alone, 2),
            }
        )
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(arguments.out, index=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}")


def a_batch(run: Callable[[int], None]) -> float:
    """Seconds a batch, once everything is warm."""
    run(FEW)
    return (seconds(run, MANY) - seconds(run, FEW)) / (MANY - FEW)


def seconds(run: Callable[[int], None], count: int) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run(count)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def forward(networks: list[nn.Module], images: Tensor, count: int, amp: bool) -> None:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        for _ in range(count):
            on_device = images.cuda(non_blocking=True)
            for network in networks:
                network(on_device)


def compare(networks: list[nn.Module], images: Tensor, count: int, **options: object) -> None:
    def same(
        samples: object, transforms: list[object], loading: batch_loop.Loading, sides: object
    ) -> Iterator[list[Tensor]]:
        yield from ([images for _ in transforms] for _ in loading.numbers or ())

    data = TensorDataset(images[:1].expand(count * len(images), -1, -1, -1))
    with mock.patch.object(batch_loop, "batches", same):
        cp.compare(
            dict(zip("xy", networks, strict=True)),
            data=data, examples=len(data), batch_size=len(images), workers=0, device="cuda", **options,
        )  # fmt: skip


if __name__ == "__main__":
    main()
