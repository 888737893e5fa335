"""Three small networks trained on handwritten digits, two seeds of each: what runs with no network and no download.

All three see 32 × 32 images. They are timm's own classes at a small size, so what works on timm works on them.
Their weights come from the trainer of this package, seed 1 and 2 (``-2``), for each NAME of cnn, vit and mlp::

    cka-probe distill --recipe digits --method none --student zoo:NAME@random:1 --seed 1 --validation 0 --out DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SUFFIXES = ("", "-2")
"""What follows a network's name: ``cnn`` was trained from seed 1, ``cnn-2`` from seed 2."""

PREPROCESSING: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.3058, 0.3058, 0.3058),  # of the training part of the digits, on the scale 0 to 1
    "std": (0.3764, 0.3764, 0.3764),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "num_classes": 10,
}


OPTIONS = {"num_classes": 10, "in_chans": 3}
"""Keyword arguments of the networks, and those of the bundled weights."""


def cnn(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """A ResNet-18 with 16 to 48 channels: 160,666 parameters, 8 residual blocks."""
    from timm.models.resnet import BasicBlock, ResNet

    options: dict[str, Any] = {"channels": (16, 24, 32, 48), "num_classes": num_classes, "in_chans": in_chans}
    return _prepared(ResNet(BasicBlock, (2, 2, 2, 2), **options), classifier="fc")


def vit(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """A vision transformer on 4 × 4 patches: 232,282 parameters, 8 blocks of width 48."""
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 8, "num_heads": 3}
    return _prepared(VisionTransformer(num_classes=num_classes, in_chans=in_chans, **options), classifier="head")


def mlp(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """An MLP-Mixer on 4 × 4 patches: 8 blocks of width 48."""
    from timm.models.mlp_mixer import MlpMixer

    options: dict[str, Any] = {"img_size": 32, "patch_size": 4, "num_blocks": 8, "embed_dim": 48}
    return _prepared(MlpMixer(num_classes=num_classes, in_chans=in_chans, **options), classifier="head")


ZOO = {"cnn": cnn, "vit": vit, "mlp": mlp}
NAMES = tuple(name + suffix for name in ZOO for suffix in SUFFIXES)


def weights_path(name: str) -> Path:
    """Where the trained weights of ``name`` (one of `NAMES`) lie."""
    return Path(__file__).with_name(f"{name}.safetensors")


def _prepared(network: nn.Module, *, classifier: str) -> nn.Module:
    network.pretrained_cfg = network.default_cfg = {**PREPROCESSING, "classifier": classifier}  # type: ignore[assignment]
    return network
