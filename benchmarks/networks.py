"""Networks for 32 px images that timm has no name for, as ``benchmarks/networks.py:resnet18`` in a model spec."""

from __future__ import annotations

from typing import Any

from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cka_probe.networks.zoo import PREPROCESSING as DIGITS

CIFAR100 = {
    "input_size": (3, 32, 32),
    "mean": (0.5071, 0.4866, 0.4409),  # of the training images
    "std": (0.2673, 0.2564, 0.2762),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def resnet18(num_classes: int = 100, width: int = 64, stride: int = 1) -> nn.Module:
    """ResNet-18 with the stem of the CIFAR literature: a 3 × 3 convolution in place of 7 × 7 with stride 2 and pooling.

    Args:
        num_classes: of the classifier.
        width: channels of the first stage, each stage doubles them; the stem has 64.
        stride: of the stem.
    """
    channels = (width, 2 * width, 4 * width, 8 * width)
    network = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, channels=channels)
    network.conv1 = nn.Conv2d(3, 64, 3, stride=stride, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(64)
    network.maxpool = nn.Identity()
    return _prepared(network, CIFAR100, num_classes, "fc")


def resmlp12(num_classes: int = 100) -> nn.Module:
    """ResMLP-12 on 4 × 4 patches: timm's ``resmlp_12_224`` takes no other patches than its own."""
    mlp: dict[str, Any] = {"mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine}
    network = MlpMixer(num_classes, img_size=32, patch_size=4, num_blocks=12, embed_dim=384, **mlp)
    return _prepared(network, CIFAR100, num_classes, "head")


def cifar_resnet(num_classes: int = 100, width: int = 16, depth: int = 1) -> nn.Module:
    """A narrow ResNet for 32 px: four stages of ``depth`` blocks, the first of ``width`` channels on 16 × 16 pixels."""
    channels = (width, 2 * width, 4 * width, 8 * width)
    network = ResNet(
        BasicBlock, (depth,) * 4, num_classes=num_classes, channels=channels, stem_type="deep", stem_width=8
    )
    network.maxpool = nn.Identity()
    return _prepared(network, CIFAR100, num_classes, "fc")


def cifar_vit(num_classes: int = 100, width: int = 64, depth: int = 5) -> nn.Module:
    """A ViT for 32 px, on 8 × 8 patches."""
    network = VisionTransformer(
        img_size=32, patch_size=8, num_classes=num_classes, embed_dim=width, depth=depth, num_heads=4
    )
    return _prepared(network, CIFAR100, num_classes, "head")


def cifar_mixer(num_classes: int = 100) -> nn.Module:
    """An MLP-Mixer for 32 px: 5 blocks of width 96 on 8 × 8 patches."""
    network = MlpMixer(num_classes, img_size=32, patch_size=8, num_blocks=5, embed_dim=96)
    return _prepared(network, CIFAR100, num_classes, "head")


def narrow_resnet(num_classes: int = 10) -> nn.Module:
    """A ResNet for the digits: four stages of one block, 8 to 48 channels, the first on 16 × 16 pixels."""
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=num_classes, channels=(8, 16, 32, 48))
    network.maxpool = nn.Identity()
    return _prepared(network, DIGITS, num_classes, "fc")


def _prepared(network: nn.Module, config: dict[str, Any], num_classes: int, classifier: str) -> nn.Module:
    network.pretrained_cfg = network.default_cfg = {  # type: ignore[assignment]
        **config, "num_classes": num_classes, "classifier": classifier,
    }  # fmt: skip
    return network
