"""Networks of a few thousand parameters that learn three colours: a CNN, a ViT, and a teacher that knows them."""

from __future__ import annotations

from typing import Any

import numpy as np
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


class WholeTeacher(nn.Module):
    """Its logits come from its stages: three channels carry the means of the colours, the others noise of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(_averaging(3 if i == 0 else 8) for i in range(4)))
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.head.weight.copy_(20 * torch.eye(3, 8))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(x).mean((2, 3)))
        return logits


def _averaging(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, 8, 2, stride=2, bias=False)
    with torch.no_grad():
        conv.weight[:3] = torch.eye(3, channels)[:, :, None, None] / 4
    return nn.Sequential(conv)


def whole_teacher() -> nn.Module:
    """A teacher that can be cut behind each of its stages."""
    torch.manual_seed(5)
    return _configured(WholeTeacher())


def ignorant() -> nn.Module:
    """A teacher that says the same of all images."""
    network = tiny_cnn()
    nn.init.zeros_(network.fc.weight)  # type: ignore[arg-type,union-attr]
    return network


def _configured(network: nn.Module) -> nn.Module:
    network.pretrained_cfg = network.default_cfg = dict(CONFIG)  # type: ignore[assignment]
    return network


class Disturbing(nn.Module):
    """A teacher that knows the colours, and does to what it shares with the student what ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how, self.passes = teacher(), how, 0
        self.pretrained_cfg = dict(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.inner(0.3 / 0.5 * x)
        if self.how == "input":
            x.data.mul_(-1)
        elif self.how == "random":
            torch.rand(3)
            np.random.rand()
        elif self.how == "modes":
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
        return logits


def good_teacher() -> nn.Module:
    return Disturbing("")


def teacher_that_changes_its_input() -> nn.Module:
    return Disturbing("input")


def teacher_that_draws() -> nn.Module:
    return Disturbing("random")


def teacher_that_changes_modes() -> nn.Module:
    return Disturbing("modes")


class Failing(nn.Module):
    """A student that does, from its pass ``at`` in training on, what ``how`` says."""

    def __init__(self, how: str, at: int) -> None:
        super().__init__()
        self.inner, self.how, self.at, self.passes = plain_vit(), how, at, 0
        self.pretrained_cfg = dict(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        if not self.training or self.passes < self.at:
            return self.inner(x)
        if self.how == "exit":
            raise SystemExit(7)
        if self.how == "half":
            return self.inner(x[: len(x) // 2])
        with torch.no_grad():
            return self.inner(x)


def student_that_exits() -> nn.Module:
    """In its second epoch of 6 steps."""
    return Failing("exit", 8)


def student_of_half_the_rows() -> nn.Module:
    return Failing("half", 1)


def student_without_gradients() -> nn.Module:
    return Failing("no gradients", 1)


class WritesOver(nn.Module):
    """A student whose first operation changes its images."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = plain_vit(), in_place
        self.pretrained_cfg = dict(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(-1) if self.in_place else -x)


def student_in_place() -> nn.Module:
    return WritesOver(True)


def student_out_of_place() -> nn.Module:
    return WritesOver(False)


class PlainCNN(nn.Module):
    """Two stages, of maps of half and of a quarter of the image's size, without normalization or anything random."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GELU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.stage2(self.stage1(x))))


def plain_cnn() -> nn.Module:
    torch.manual_seed(3)
    network = PlainCNN()
    network.pretrained_cfg = dict(CONFIG)  # type: ignore[assignment]
    return network
