"""Networks of a few thousand parameters that learn three colours: a CNN, a ViT, and a teacher that knows them."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZE = 16
CONFIG: dict[str, Any] = {
    "input_size": (3, SIZE, SIZE), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0,
    "interpolation": "bicubic", "num_classes": 3, "classifier": "head",
}  # fmt: skip


def tiny_cnn(num_classes: int = 3) -> nn.Module:
    """Four stages of one residual block, batch norm and dropout."""
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=num_classes, channels=(8, 8, 16, 16), drop_rate=0.2)
    return _configured(network)


def tiny_vit(num_classes: int = 3) -> nn.Module:
    """Six blocks on 4 x 4 patches, with dropout and stochastic depth."""
    return _configured(
        VisionTransformer(
            img_size=SIZE,
            patch_size=4,
            embed_dim=16,
            depth=6,
            num_heads=2,
            num_classes=num_classes,
            proj_drop_rate=0.1,
            drop_path_rate=0.1,
        )
    )


def plain_vit() -> nn.Module:
    """Without anything random in its forward pass."""
    return _configured(
        VisionTransformer(img_size=SIZE, patch_size=4, embed_dim=16, depth=6, num_heads=2, num_classes=3)
    )


class ColourTeacher(nn.Module):
    """Random stages for the similarity, and the mean of each channel for logits: right on every image."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(_Block(3 if i == 0 else 8, 8) for i in range(4)))
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        self.stages(x)
        return 20 * (x + self.mean).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu()


def teacher() -> nn.Module:
    """Sees the images with a normalization of its own."""
    torch.manual_seed(5)
    network = ColourTeacher(0.1)
    network.pretrained_cfg = {**CONFIG, "mean": (0.1, 0.1, 0.1), "std": (0.3, 0.3, 0.3)}  # type: ignore[assignment]
    return network


def ignorant() -> nn.Module:
    """A teacher that says the same of all images."""
    network = tiny_cnn()
    nn.init.zeros_(network.fc.weight)  # type: ignore[arg-type,union-attr]
    return network


def _configured(network: nn.Module) -> nn.Module:
    network.pretrained_cfg = network.default_cfg = dict(CONFIG)  # type: ignore[assignment]
    return network
