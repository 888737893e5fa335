"""One network of every architecture family in timm, random weights: which blocks and stages are found, and do they run.

    python benchmarks/timm_families.py [FAMILY ...] [--out benchmarks/timm_families.csv]

Of each family (a module of ``timm.models``) a small network is taken. It is compared with itself on 8 images by its
blocks, and its stages and its modules are listed; each stage must put out a map or tokens. A family that fails has
the error in the last column, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import timm
import torch

import cka_probe as cp
from cka_probe.activations.layers import select
from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import DRY_RUN_IMAGES, trace

EXAMPLES, BATCH, CANDIDATES = 8, 4, 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    rows = []
    for family in arguments.families or timm.list_modules():
        model = smallest(family)
        if model is None:
            continue  # a module of parts, without a network
        rows.append({"family": family, "model": model, **examine(model)})
        print(*rows[-1].values(), sep=" | ", flush=True)
        table = pd.DataFrame(rows)
        table.to_csv(arguments.out, index=False)  # after each, so that a run that is cut off has not been in vain
    failed = table[table.error != ""]
    print(f"timm {timm.__version__}: {len(table)} families, {len(failed)} failed -> {arguments.out}")
    return int(len(failed) > 0)


def smallest(family: str) -> str | None:
    """A small network of a family: of those whose names say so, else of all, the least of the first few.

    timm's own test networks do not count. Building all of its 1,371 networks to count them would take half an hour.
    """
    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    names.sort(
        key=lambda name: not re.search(r"atto|femto|pico|nano|tiny|small|_xxs|_xs|_s\d*\b|_s_|_b0|18|12|_t\d*\b", name)
    )
    sizes = {}
    for name in names[:CANDIDATES]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # a network that needs real tensors
            sizes[name] = sys.maxsize
    return min(sizes, key=lambda name: (sizes[name], name)) if sizes else None


def examine(model: str) -> dict[str, object]:
    """What is found in a network, and whether it runs: a row of the table."""
    try:
        subject = cp.load_subject(f"{model}@random")
        with torch.no_grad():
            traced = trace(subject.network, torch.rand(DRY_RUN_IMAGES, *subject.preprocessing.size))
        found = select(subject.network, traced, ["blocks", "stages", "all"])
        size = subject.preprocessing.size[1:]
        wrong = [layer.name for layer in found["stages"] if StageShape.of(layer, size) is None]
        similarity = cp.compare([subject], data="digits", examples=EXAMPLES, batch_size=BATCH)
        kinds = Counter(layer.kind for layer in found["blocks"])
        return {
            "size": "x".join(map(str, subject.preprocessing.size)),
            "blocks": len(similarity.rows),
            "kinds": " ".join(f"{kind}:{count}" for kind, count in kinds.items()),
            "first": similarity.rows[0].name,
            "last": similarity.rows[-1].name,
            "stages": " ".join(layer.name for layer in found["stages"]),
            "all": len(found["all"]),
            "error": f"neither maps nor tokens: {' '.join(wrong)}" if wrong or not found["stages"] else "",
        }
    except Exception as error:  # the table is there to tell
        return {"error": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]}


if __name__ == "__main__":
    sys.exit(main())
