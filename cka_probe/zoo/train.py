"""Train the bundled networks on the digits: ``python -m cka_probe.zoo.train [NAME ...] [--out DIR]``.

Seeded; about a minute a network on two cores. One line an epoch in ten, the accuracy on the held-out digits at the
end, and one safetensors file a network.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.sources import digits
from cka_probe.zoo import NAMES, PREPROCESSING, SEEDS, ZOO, weights_path

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 100, 64, 2e-3, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, help="folder for the weights; without it the bundled files are replaced")
    arguments = parser.parse_args()
    for name in arguments.names:
        network = train(name)
        path = arguments.out / f"{name}.safetensors" if arguments.out else weights_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path)
        print(f"{name}: {accuracy(network):.2%} of the held-out digits -> {path}", flush=True)


def train(name: str) -> nn.Module:
    """The network ``name`` (one of `NAMES`), trained on the digits' training part from its own seed."""
    architecture, suffix = name.removesuffix("-2"), "-2" if name.endswith("-2") else ""
    torch.manual_seed(SEEDS[suffix])
    network = ZOO[architecture]().train()
    images, labels = digit_tensors("train")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(network(distort(images[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"{name}: epoch {epoch + 1}, loss {loss.item():.3f}", flush=True)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """The share of the held-out digits that ``network`` (in evaluation mode) names right."""
    images, labels = digit_tensors("validation")
    return float((network(images).argmax(1) == labels).float().mean())


def digit_tensors(split: str) -> tuple[Tensor, Tensor]:
    """The digits as the networks see them, (n, 3, 32, 32) normalized, and their labels, (n,)."""
    from cka_probe.models import Preprocessing

    transform = Preprocessing.from_config(PREPROCESSING).transform()
    images, labels = digits(split)
    return torch.stack([transform(image.convert("RGB")) for image in images]), torch.tensor(labels)


def distort(images: Tensor) -> Tensor:
    """The images, (n, 3, h, w), each turned, scaled and shifted a little at random; the background stays black."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5  # radians: 14 degrees to either side
    scale = 1 + (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.3  # of half the width
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    background = images.amin()
    return F.grid_sample(images - background, grid, align_corners=False) + background


if __name__ == "__main__":
    main()
