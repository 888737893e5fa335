"""What a comparison costs beyond running the networks, beside two other tools, in one run on one machine.

    python benchmarks/compare_overhead.py [--cases a b c ...] [--rounds 3] [--out benchmarks/compare_overhead.csv]

Cases:
    a         ResNet-18 and DeiT-tiny, 224 px, their blocks (8 and 12 layers), batches of 64
    b         the same, all modules (93 and 263)
    c         ResNet-18 with ResNet-18, 32 px, 17 3 x 3 and stem convolutions and the classifier of each, batches of 256
    trained   the bundled CNN and ViT on the digits, their blocks, batches of 128
    offset    two perceptrons whose features have a mean of 100 times their spread, batches of 128
    models    2, 4 and 8 networks (ResNet-18, 32 px, blocks): cka-probe alone
    memory    peak memory against images, layers and batch size: cka-probe alone

Every contender sees the same images, already in memory, and the same networks, with random weights where nothing else
is said: `forward` runs the networks and nothing else. The rounds go through the contenders in turn, each run in a
process of its own, so that none inherits what another did to the allocator. The time of a batch is the median over all
batches of all rounds, so that a slow moment of the machine does not count; what a run does once (a dry run, the hooks,
the result) is added, as a share of each batch. torch-cka is run in one round, and in case b, where it needs minutes, on
one batch; its time is that of the run over its batches. Times are printed as ratios to `forward`. The error is the
largest difference to a float64 computation of the same estimator on the same activations. Cases that are not named keep
their rows in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cka_probe as cp
from cka_probe.images.batches import Loading, batches
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source
from cka_probe.networks.models import load_subject


@dataclass(frozen=True)
class Case:
    """Networks, their layers, and the images they see: smooth noise, or the digits."""

    models: tuple[str, ...]
    layers: str
    size: int
    batch: int
    batches: int
    data: str = "noise"


RESNET_CONVOLUTIONS = "conv1,layer*.*.conv*,fc"
CASES = {
    "a": Case(("resnet18", "deit_tiny_patch16_224"), "blocks", 224, 64, 8),
    "b": Case(("resnet18", "deit_tiny_patch16_224"), "all", 224, 64, 6),
    "c": Case(("resnet18", "resnet18"), RESNET_CONVOLUTIONS, 32, 256, 32),
    "trained": Case(("zoo:cnn", "zoo:vit"), "blocks", 32, 128, 8, "digits"),
    "offset": Case(("offset", "offset"), "type:Linear", 32, 128, 8),
    **{f"models-{count}": Case(("resnet18",) * count, "blocks", 32, 128, 12) for count in (2, 4, 8)},
}
ALL = ["a", "b", "c", "trained", "offset", "models", "memory"]
Tick = Callable[[], None]
Networks = tuple[nn.Module, ...]
Layers = list[list[str]]
MAX_PEER_BATCHES = {("b", "torch-cka"): 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--worker", nargs=3, metavar=("CASE", "CONTENDER", "FILE"), help="one run, into FILE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.worker:
        work(*arguments.worker)
        return
    rows = []
    for case in arguments.cases:
        if case == "memory":
            rows += memory_growth()
        elif case == "models":
            for name in (name for name in CASES if name.startswith("models-")):
                rows += measure(name, arguments.rounds, ["cka_probe"])
        else:
            rows += measure(case, arguments.rounds, arguments.contenders)
    table = pd.DataFrame(rows)
    kept = pd.read_csv(arguments.out, dtype=str) if arguments.out.exists() else pd.DataFrame({"case": []})
    table = pd.concat([kept[~kept["case"].isin(table["case"])], table]).sort_values("case", kind="stable")
    table.to_csv(arguments.out, index=False)
    print(table.to_string(index=False))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, timm {timm.__version__}")


def measure(name: str, rounds: int, contenders: list[str]) -> list[dict[str, object]]:
    """Every contender on one case, in turn, each run in a process of its own: a row each."""
    contenders = ["forward", *(contender for contender in contenders if contender != "forward")]
    clocks = {contender: Clock() for contender in contenders}
    values: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for contender in contenders:
                if contender == "torch-cka" and turn:
                    continue
                file = f"{folder}/{contender}.npz"
                subprocess.run([sys.executable, __file__, "--worker", name, contender, file], check=True)
                with np.load(file) as run:
                    clocks[contender].add(run["stamps"], int(run["batches"]))
                    if "values" in run and run["batches"] == CASES[name].batches:
                        values[contender] = torch.from_numpy(run["values"])
    best = {contender: clock.seconds() for contender, clock in clocks.items()}
    errors = dict.fromkeys(best, "")
    if len(CASES[name].models) == 2:
        truth = float64_values(*_setting(CASES[name]), CASES[name].batch)
        errors |= {contender: f"{(found - truth).abs().max():.1e}" for contender, found in values.items()}
    return [
        {
            "case": name,
            "contender": contender,
            "time / forward": round(seconds / best["forward"], 3),
            "time / cka_probe": round(seconds / best["cka_probe"], 2) if "cka_probe" in best else "",
            "largest error": errors[contender],
        }
        for contender, seconds in best.items()
    ]


def work(name: str, contender: str, file: str) -> None:
    """One run of one contender, after a batch to warm up; its values and the times of its batches go into a file."""
    case = CASES[name]
    count = MAX_PEER_BATCHES.get((name, contender), case.batches)
    networks, chosen, images = _setting(case)
    run = CONTENDERS[contender]
    if contender != "torch-cka":
        run(networks, chosen, images[: case.batch], case, lambda: None)
    stamps = [time.perf_counter()]
    values = run(networks, chosen, images[: count * case.batch], case, lambda: stamps.append(time.perf_counter()))
    stamps.append(time.perf_counter())
    found = {} if values is None else {"values": values.numpy()}
    np.savez(file, stamps=np.array(stamps), batches=count, **found)


class Clock:
    """The time of a batch, from the times at which batches ended in several runs."""

    def __init__(self) -> None:
        self._batches: list[float] = []  # seconds, the first batch of each run left out
        self._once: list[float] = []  # seconds a run beyond its batches, as a share of one

    def add(self, stamps: NDArray[np.float64], count: int) -> None:
        """Add a run of ``count`` batches: when it began, when each batch ended (or nothing of that), when it ended."""
        began, *ends, ended = stamps
        if not ends:
            self._batches.append((ended - began) / count)
            return
        first, *others = np.diff([began, *ends])
        self._batches += others
        self._once.append((first - np.median(others) + ended - ends[-1]) / count)

    def seconds(self) -> float:
        """A batch, with its share of what a run does once."""
        return float(np.median(self._batches) + (np.median(self._once) if self._once else 0))


def forward(networks: Networks, layers: Layers, images: Tensor, case: Case, tick: Tick) -> None:
    with torch.no_grad():
        for part in images.split(case.batch):
            for network in networks:
                network(part)
            tick()


def run_cka_probe(networks: Networks, layers: Layers, images: Tensor, case: Case, tick: Tick) -> Tensor:
    # compare() shuffles; undo it beforehand, so that its batches are those of the others.
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    similarity = cp.compare(
        dict(zip("xyzuvwst", networks, strict=False)),
        data=TensorDataset(images[order.argsort()]),
        examples=len(images),
        layers=case.layers,
        batch_size=case.batch,
        workers=0,
        device="cpu",
        progress=lambda *_: tick(),
    )
    return torch.tensor(similarity.between("x", "y").values)


def run_pytorch_cka(networks: Networks, layers: Layers, images: Tensor, case: Case, tick: Tick) -> Tensor:
    from cka import compute_cka

    class Ticking(DataLoader[tuple[Tensor, ...]]):
        def __iter__(self) -> Iterator[tuple[Tensor, ...]]:  # type: ignore[override]
            for part in super().__iter__():
                yield part
                tick()

    loader = Ticking(TensorDataset(images), batch_size=case.batch)
    options = {"layers": layers[0], "model2_layers": layers[1], "device": "cpu", "progress": False}
    (values,) = compute_cka(*networks, loader, **options)
    return values.double().cpu()


def run_torch_cka(networks: Networks, layers: Layers, images: Tensor, case: Case, tick: Tick) -> Tensor:
    from torch_cka import CKA

    loader = DataLoader(TensorDataset(images), batch_size=case.batch)
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        comparison = CKA(*networks, model1_layers=layers[0], model2_layers=layers[1], device="cpu")
        try:
            comparison.compare(loader)
        except AssertionError:  # it gives up on a NaN at the end, after all the work
            return torch.full((len(layers[0]), len(layers[1])), torch.nan).double()
    return comparison.hsic_matrix.double().cpu()


CONTENDERS: dict[str, Callable[[Networks, Layers, Tensor, Case, Tick], Tensor | None]] = {
    "forward": forward,
    "cka_probe": run_cka_probe,
    "pytorch-cka": run_pytorch_cka,
    "torch-cka": run_torch_cka,
}


def float64_values(networks: Networks, layers: Layers, images: Tensor, batch: int) -> Tensor:
    """The same estimator in float64 throughout, on the float32 activations, written from Nguyen et al. (2021)."""
    sums = None
    for part in images.split(batch):
        grams = []
        for network, names in zip(networks, layers, strict=True):
            found: dict[str, Tensor] = {}

            def keep(which, tensor, found=found):
                x = tensor.flatten(1).double()
                x = x - x.mean(0)
                found[which.module] = x @ x.T

            with torch.no_grad(), cp.capture(network, names, keep):
                network(part)
            grams += [found[name] for name in names]
        k = torch.stack(grams)
        n = len(part)
        k = k * (1 - torch.eye(n, dtype=torch.float64))
        ones = k.sum((1, 2))
        rows = k.sum(2)
        cross = torch.einsum("aij,bij->ab", k, k)
        cross = cross + ones[:, None] * ones[None] / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T
        sums = cross if sums is None else sums + cross
    own = sums.diagonal().sqrt()
    first = len(layers[0])
    return (sums / own[:, None] / own[None])[:first, first:]


def memory_growth() -> list[dict[str, object]]:
    """Peak memory of a comparison beyond the process, over that of 512 images, the blocks and batches of 64.

    Two ResNet-18 at 96 px. The last row is the same of the bare forward passes.
    """

    def peak(program: str, examples: int = 512, layers: str = "blocks", batch: int = 64) -> float:
        command = [sys.executable, "-c", program, str(examples), layers, str(batch)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    usual, bare = peak(_MEMORY_PROGRAM), peak(_FORWARD_PROGRAM)
    ratios = {
        "4096 images": peak(_MEMORY_PROGRAM, examples=4096) / usual,
        "all 93 modules": peak(_MEMORY_PROGRAM, layers="all") / usual,
        "batches of 256": peak(_MEMORY_PROGRAM, batch=256) / usual,
        "batches of 256, bare forward": peak(_FORWARD_PROGRAM, batch=256) / bare,
    }
    return [{"case": "memory", "contender": name, "peak memory": round(ratio, 3)} for name, ratio in ratios.items()]


_BEGIN = """
import sys
import torch, timm
from cka_probe.runtime import footprint
examples, layers, batch = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
networks = {name: timm.create_model("resnet18").eval() for name in "xy"}
cpu = torch.device("cpu")
before = footprint.in_use(cpu)
footprint.forget_peak(cpu)
"""

_MEMORY_PROGRAM = f"""{_BEGIN}
import cka_probe as cp
class Noise(torch.utils.data.Dataset):
    def __len__(self): return examples
    def __getitem__(self, index): return torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(index))
cp.compare(networks, data=Noise(), examples=examples, layers=layers, batch_size=batch, workers=0)
print(footprint.peak(cpu) - before)
"""

_FORWARD_PROGRAM = f"""{_BEGIN}
with torch.no_grad():
    for _ in range(4):
        for network in networks.values(): network(torch.randn(batch, 3, 96, 96))
print(footprint.peak(cpu) - before)
"""


def _setting(case: Case) -> tuple[Networks, Layers, Tensor]:
    """The networks of a case, their layers and the images."""
    from cka_probe.probing.compare import list_layers

    networks = tuple(_network(model, seed) for seed, model in enumerate(case.models))
    found = [list_layers(network, layers=case.layers, image_size=case.size) for network in networks]
    return networks, [[layer.name for layer in layers] for layers in found], _images(case)


def _network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name.startswith("zoo:"):
        return load_subject(name).network.eval()
    if name == "offset":
        widths = (3 * 32 * 32, 512, 512, 512)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.constant_(layer.bias, 100.0)
        return nn.Sequential(nn.Flatten(), *(part for layer in layers for part in (layer, nn.LayerNorm(512)))).eval()
    # A residual branch whose last norm starts at 0 would make the layers of a stage equal.
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    return timm.create_model(name, **options).eval()


def _images(case: Case) -> Tensor:
    """Photographs would do as well as smooth noise, whose images have correlated features."""
    if case.data != "noise":
        samples = sample(open_source(case.data), case.batch * case.batches, seed=0)
        transform = load_subject(case.models[0]).preprocessing.transform()
        return next(batches(samples, [transform], Loading(len(samples))))[0]
    torch.manual_seed(0)
    coarse = torch.randn(case.batch * case.batches, 3, 8, 8)
    return nn.functional.interpolate(coarse, size=case.size, mode="bicubic", align_corners=False)


if __name__ == "__main__":
    main()
