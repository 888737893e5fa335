"""The peak memory that --memory plans against the measured one, of comparisons in a process each.

    python benchmarks/plan_accuracy.py [--data path/to/images] [--cases few many in-turn ...] [--examples 256]

Cases:
    few        3 networks that fit together
    many       20 networks that fit together
    in-turn    the same 20 under a budget that holds a few of them at a time
    rbf        the 3 with linear and RBF CKA and 99 permutations
    large      the 3 at twice the image size and in batches of 128

Networks of timm with random weights, their blocks. A budget is given beyond what the process itself takes, which
loading PyTorch and timm decides, and is not planned but read. Ratios are planned / measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cka_probe.runtime import footprint
from cka_probe.runtime.sizes import format_bytes

NETWORKS = (
    "resnet18", "mobilenetv2_100", "vit_tiny_patch16_224,img_size={size}", "resnet34", "regnetx_004", "regnety_004",
    "convnext_atto", "convnext_femto", "efficientnet_b0", "mobilenetv3_small_100", "mnasnet_100", "semnasnet_100",
    "ghostnet_100", "lcnet_050", "tinynet_c", "fbnetc_100", "spnasnet_100", "edgenext_xx_small", "poolformer_s12",
    "vit_small_patch16_224,img_size={size}",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is compared, and how much memory there is beyond that of the process."""

    networks: int
    budget: int = 1 << 40
    size: int = 64
    batch: int = 64
    measures: tuple[str, ...] = ("cka",)
    permutations: int = 0


CASES = {
    "few": Case(3),
    "many": Case(20),
    "in-turn": Case(20, budget=450_000_000),
    "rbf": Case(3, measures=("cka", "cka-rbf"), permutations=99),
    "large": Case(3, size=128, batch=128),
}


def work(name: str, data: str, examples: int, scratch: str) -> None:
    """One run; its plan as JSON."""
    import torch

    import cka_probe as cp

    case = CASES[name]
    cp.compare(
        ["zoo:cnn"], examples=64, measures=list(case.measures), batch_size=32, memory="1TB"
    )  # what is imported late
    process = footprint.in_use(torch.device("cpu"))
    result = cp.compare(
        [spec.format(size=case.size) + "@random" for spec in NETWORKS[: case.networks]],
        data=data, image_size=case.size, examples=examples, batch_size=case.batch, measures=list(case.measures),
        permutations=case.permutations, memory=min(process + case.budget, 1 << 40), scratch=scratch, workers=1,
    )  # fmt: skip
    similarity = result["cka"]
    plan = similarity.provenance.plan
    print(json.dumps({**plan, "layers": len(similarity.rows)}))


def row(name: str, plan: dict[str, object], examples: int) -> dict[str, object]:
    """Planned and measured side by side."""
    case = CASES[name]
    process = plan["memory"]["process"]
    planned, took = plan["estimated"], plan["measured"]
    own, own_took = planned["peak_bytes"] - process, took["peak_bytes"] - process
    return {
        "case": name,
        "networks": case.networks,
        "layers": plan["layers"],
        "examples": examples,
        "batch": case.batch,
        "size": case.size,
        "passes": len(plan["passes"]),
        "peak": format_bytes(took["peak_bytes"]),
        "planned peak": format_bytes(planned["peak_bytes"]),
        "ratio of peaks": round(planned["peak_bytes"] / took["peak_bytes"], 2),
        "beyond the process": format_bytes(own_took),
        "ratio beyond the process": round(own / own_took, 2),
        "Gram file": format_bytes(plan["disk_bytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--one", choices=CASES, help="run this one in this process")
    parser.add_argument("--scratch")
    arguments = parser.parse_args()
    if arguments.one:
        work(arguments.one, arguments.data, arguments.examples, arguments.scratch)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            options = ["--data", arguments.data, "--examples", str(arguments.examples), "--scratch", folder]
            command = [sys.executable, __file__, "--one", name, *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(row(name, json.loads(done.stdout.splitlines()[-1]), arguments.examples))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if arguments.out.exists():
        kept = pd.read_csv(arguments.out)
        table = pd.concat([kept[~kept["case"].isin(table["case"])], table])
    table.to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
