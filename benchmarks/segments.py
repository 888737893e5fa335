"""One network of every architecture family in timm, cut behind each of its stages: do head and tail equal the network?

    python benchmarks/segments.py [FAMILY ...] [--out benchmarks/segments.csv]

The networks are those of ``timm_families.csv``, with random weights, on the smallest images that they take, and with
DropPath and dropout where they have them. The 412M parameters of DeepSeek's ViT would take 10 GB, so its blocks are
narrower. `cut` checks itself on an example of 2 images; here it is checked on 3 other ones: the output bit for bit and
the buffers afterwards, in evaluation and in training mode with one seed, and the tail alone on the activation that a
hook took from the network's own forward pass. A family that is in the table already is left out, so that a run that was
cut off goes on. One thread.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import nn

from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.layers import select
from cka_probe.activations.modules import module_at
from cka_probe.activations.segments import Crossing, cut
from cka_probe.activations.trace import DRY_RUN_IMAGES, trace

FAMILIES = Path(__file__).with_name("timm_families.csv")
SIDES = (64, 96, 128, 224)
NARROWER = {"deepseek_vit": {"embed_dim": 256, "num_heads": 4}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = pd.read_csv(FAMILIES).set_index("family").model
    table = pd.read_csv(arguments.out, keep_default_na=False) if arguments.out.is_file() else pd.DataFrame()
    done = set(table.family) if len(table) else set()
    for family in arguments.families or models.index:
        if family in done:
            continue
        narrower = NARROWER.get(family, {})
        model = ",".join([models[family], *(f"{key}={value}" for key, value in narrower.items())])
        for row in examine(models[family], narrower):
            print(family, *row.values(), sep=" | ", flush=True)
            table = pd.concat([table, pd.DataFrame([{"family": family, "model": model, **row}])])
        table = table.sort_values("family", kind="stable")
        table.to_csv(arguments.out, index=False)
    failed = table[table.equal != "yes"]
    whole = table.groupby("family").equal.agg(lambda equal: (equal == "yes").all())
    print(
        f"timm {timm.__version__}: {len(table) - len(failed)} of {len(table)} cuts are equal, at each stage in "
        f"{whole.sum()} of {len(whole)} families -> {arguments.out}"
    )
    return int(len(failed) > 0)


def examine(model: str, arguments: dict[str, int]) -> list[dict[str, object]]:
    """A row a stage."""
    try:
        network, size, drops = build(model, arguments)
        network.eval()
        with torch.no_grad():
            traced = trace(network, torch.rand(DRY_RUN_IMAGES, *size))
        stages = [layer.name for layer in select(network, traced, ["stages"])["stages"]]
    except Exception as error:  # the table is there to tell
        return [{"size": "", "drops": "", "stage": "", "equal": "no", "tail_alone": "", "crossing": "", "seconds": "",
                 "reason": told(error)}]  # fmt: skip
    size_text = "x".join(map(str, size))
    return [{"size": size_text, "drops": drops, "stage": stage, **check(network, stage, size)} for stage in stages]


def build(model: str, arguments: dict[str, int]) -> tuple[nn.Module, tuple[int, int, int], str]:
    """A network, the smallest size of images on which it runs in training too, and its sources of randomness."""
    native = timm.get_pretrained_cfg(model)
    channels, side, _ = native.input_size if native else (3, 224, 224)
    for smaller in (*(smaller for smaller in SIDES if smaller < side), side):
        for resized in ({"img_size": smaller}, {}):
            for drops in ({"drop_path_rate": 0.3, "drop_rate": 0.2}, {"drop_rate": 0.2}, {"drop_path_rate": 0.3}, {}):
                torch.manual_seed(0)
                try:
                    network = timm.create_model(model, **arguments, **resized, **drops)
                    with torch.no_grad():
                        network.train()(torch.rand(2, channels, smaller, smaller))
                        network.eval()(torch.rand(2, channels, smaller, smaller))
                except Exception:  # not with these arguments, or not of this size
                    continue
                return network, (channels, smaller, smaller), " ".join(drops)
    raise ValueError(f"{model} does not run.")


def check(network: nn.Module, stage: str, size: tuple[int, int, int]) -> dict[str, object]:
    """Whether the segments equal the network on images that `cut` has not seen."""
    start = time.perf_counter()
    row: dict[str, object] = {"equal": "no", "tail_alone": "", "crossing": "", "seconds": "", "reason": ""}
    try:
        head, tail = cut(network, stage, torch.rand(2, *size))
        row["seconds"] = round(time.perf_counter() - start, 2)
        images = torch.rand(3, *size)
        differing = []
        for training in (False, True):
            network.train(training)
            state = {name: value.clone() for name, value in network.state_dict().items()}
            taken: list[Any] = []
            hook = module_at(network, re.sub(r"[\[:].*", "", stage)).register_forward_hook(
                lambda _module, _args, output, taken=taken: taken.append(cloned(output))
            )
            expected = seeded(network, images)
            hook.remove()
            after = list(network.state_dict().values())
            network.load_state_dict(state)
            crossing = seeded(head, images)
            found = tail(crossing)
            if not equal(expected, found) or not equal(after, list(network.state_dict().values())):
                differing.append("training" if training else "evaluation")
            network.load_state_dict(state)
            if not training:
                alone = tail_alone(tail, taken[0], expected)
                rest = crossing.rest if isinstance(crossing, Crossing) else ()
                row |= {"tail_alone": alone, "crossing": " ".join(type(value).__name__ for value in rest)}
        row |= {"reason": f"differs in {' and '.join(differing)}"} if differing else {"equal": "yes"}
    except Exception as error:  # the table is there to tell
        row["reason"] = told(error)
    return row


def tail_alone(tail: nn.Module, activation: Any, expected: Any) -> str:
    """Whether the tail equals the network on what a hook took."""
    try:
        return "yes" if equal(expected, tail(activation)) else "differs"
    except Exception as error:  # the table is there to tell
        return told(error)


def seeded(module: nn.Module, images: torch.Tensor) -> Any:
    torch.manual_seed(1)
    return module(images.clone())


def equal(first: Any, second: Any) -> bool:
    pairs = [[tensor for _, tensor in tensors_in(value)] for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
        for one, other in zip(*pairs, strict=True)
    )


def cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(cloned, value)) if isinstance(value, (tuple, list)) else value


def told(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]


if __name__ == "__main__":
    sys.exit(main())
