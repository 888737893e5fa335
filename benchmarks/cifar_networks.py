"""Networks for 32 px images that timm has no name for, as ``benchmarks/cifar_networks.py:resnet18`` in a model spec."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, ResNet
from torch import nn


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
    network.pretrained_cfg = network.default_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.5071, 0.4866, 0.4409),  # of CIFAR-100's training images
        "std": (0.2673, 0.2564, 0.2762),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": num_classes,
        "classifier": "fc",
    }
    return network
