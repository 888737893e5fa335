"""Blocks and stages of the families of torchvision, timm and transformers, as their authors name them.

The expected numbers are the depths in the papers and in the networks' sources. Structure alone is built, on the meta
device, wherever a network allows it.
"""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from cka_probe.activations.blocks import find_blocks
from cka_probe.activations.layers import select
from cka_probe.activations.trace import trace

pytestmark = pytest.mark.slow

# Name, number of blocks, first and last: what the papers and torchvision's sources call block, layer or module.
TORCHVISION = [
    ("alexnet", 8, "features.0", "classifier.6"),
    ("convnext_tiny", 18, "features.1.0", "features.7.2"),
    ("densenet121", 58, "features.denseblock1.denselayer1", "features.denseblock4.denselayer16"),
    ("efficientnet_b0", 16, "features.1.0", "features.7.0"),
    ("efficientnet_v2_s", 40, "features.1.0", "features.6.14"),
    ("googlenet", 9, "inception3a", "inception5b"),
    ("inception_v3", 11, "Mixed_5b", "Mixed_7c"),
    ("maxvit_t", 11, "blocks.0.layers.0", "blocks.3.layers.1"),
    ("mnasnet0_5", 16, "layers.8.0", "layers.13.0"),
    ("mobilenet_v2", 17, "features.1", "features.17"),
    ("mobilenet_v3_large", 15, "features.1", "features.15"),
    ("mobilenet_v3_small", 11, "features.1", "features.11"),
    ("regnet_x_400mf", 22, "trunk_output.block1.block1-0", "trunk_output.block4.block4-11"),
    ("regnet_y_400mf", 16, "trunk_output.block1.block1-0", "trunk_output.block4.block4-5"),
    ("resnet18", 8, "layer1.0", "layer4.1"),
    ("resnext50_32x4d", 16, "layer1.0", "layer4.2"),
    ("shufflenet_v2_x0_5", 16, "stage2.0", "stage4.3"),
    ("squeezenet1_0", 8, "features.3", "features.12"),
    ("squeezenet1_1", 8, "features.3", "features.12"),
    ("swin_t", 12, "features.1.0", "features.7.1"),
    ("swin_v2_t", 12, "features.1.0", "features.7.1"),
    ("vgg11", 11, "features.0", "classifier.6"),
    ("vit_b_16", 12, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
    ("r3d_18", 8, "layer1.0", "layer4.1"),
    ("mc3_18", 8, "layer1.0", "layer4.1"),
    ("r2plus1d_18", 8, "layer1.0", "layer4.1"),
    ("s3d", 9, "features.5", "features.15"),
    ("mvit_v1_b", 16, "blocks.0", "blocks.15"),
    ("mvit_v2_s", 16, "blocks.0", "blocks.15"),
    ("swin3d_t", 12, "features.0.0", "features.6.1"),
]

TORCHVISION_STAGES = {
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
    "efficientnet_b0": ["features.2", "features.3", "features.5", "features.7"],
    "googlenet": ["inception3b", "inception4e", "inception5b"],
    "mobilenet_v3_large": ["features.3", "features.6", "features.12", "features.15"],
    "regnet_y_400mf": [f"trunk_output.block{stage}" for stage in (1, 2, 3, 4)],
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "shufflenet_v2_x0_5": ["stage2", "stage3", "stage4"],
    "squeezenet1_0": ["features.5", "features.10", "features.12"],
    "swin_t": ["features.1", "features.3", "features.5", "features.7"],
}

TIMM = {
    "caformer_s18": 3 + 3 + 9 + 3,
    "coat_tiny": 4 * 2 + 6,  # serial and parallel
    "convit_tiny": 12,
    "convnext_atto": 2 + 2 + 6 + 2,
    "csatv2": 2 + 2 + 8 + 6,
    "davit_tiny": 2 * (1 + 1 + 3 + 1),  # a spatial and a channel block each
    "edgenext_xx_small": 2 + 2 + 6 + 2,
    "efficientformer_l1": 3 + 2 + 6 + 4,
    "efficientformerv2_s0": 2 + 2 + 6 + 4,
    "efficientvim_m1": 2 + 2 + 2,
    "efficientvit_m0": 1 + 2 + 3,
    "fasternet_t0": 1 + 2 + 8 + 2,
    "focalnet_tiny_srf": 2 + 2 + 6 + 2,
    "ghostnet_050": 16,
    "hiera_tiny_224": 1 + 2 + 7 + 2,
    "levit_128s": 2 + 3 + 4,
    "mambaout_femto": 3 + 3 + 9 + 3,
    "mobileone_s1": 2 + 8 + 10 + 1,
    "mobilevit_xxs": 7 + 3,  # inverted residuals and MobileViT blocks
    "mvitv2_tiny": 1 + 2 + 5 + 2,
    "nest_tiny": 2 + 2 + 8,
    "nextvit_small": 3 + 4 + 10 + 3,
    "pit_xs_224": 2 + 6 + 4,
    "pvt_v2_b0": 4 * 2,
    "repvit_m1": 2 + 2 + 14 + 2,
    "res2net50_14w_8s": 3 + 4 + 6 + 3,
    "rexnet_100": 16,
    "sequencer2d_s": 4 + 3 + 8 + 3,
    "shvit_s1": 2 + 4 + 5,
    "starnet_s1": 2 + 2 + 8 + 3,
    "swiftformer_xs": 3 + 3 + 6 + 4,
    "tiny_vit_5m_224": 2 + 2 + 6 + 2,
    "tresnet_m": 3 + 4 + 11 + 3,
    "twins_svt_small": 2 + 2 + 10 + 4,
    "visformer_tiny": 7 + 4 + 4,
    "volo_d1_224": 4 + 4 + 8 + 2 + 2,  # the last two see the class token
    "xcit_nano_12_p8_224": 12 + 2,
}

# The prefix of the class names, and the depths of the default configuration.
TRANSFORMERS = {
    "Beit": 12,
    "Bit": 3 + 4 + 6 + 3,
    "CLIPVision": 12,
    "ConvNext": 3 + 3 + 9 + 3,
    "ConvNextV2": 3 + 3 + 9 + 3,
    "Cvt": 1 + 2 + 10,
    "Data2VecVision": 12,
    "DeiT": 12,
    "Dinov2": 12,
    "Dinov2WithRegisters": 12,
    "EfficientNet": 55,  # of B7
    "FocalNet": 2 + 2 + 6 + 2,
    "Hiera": 2 + 3 + 16 + 3,
    "MobileNetV2": 16,  # the first of the 17 is in its stem
    "PoolFormer": 2 + 2 + 6 + 2,
    "Pvt": 4 * 2,
    "PvtV2": 4 * 2,
    "RegNet": 2 + 6 + 12 + 2,
    "ResNet": 3 + 4 + 6 + 3,
    "Segformer": 4 * 2,
    "SiglipVision": 12,
    "SwiftFormer": 3 + 3 + 6 + 4,
    "Swin": 2 + 2 + 6 + 2,
    "Swinv2": 2 + 2 + 6 + 2,
    "Timesformer": 12,
    "ViT": 12,
    "ViTMAE": 12,
    "VideoMAE": 12,
    "Vivit": 12,
    "Yolos": 12,
}


def all_blocks(network: nn.Module) -> list[str]:
    return find_blocks(network, {path for path, _ in network.named_modules()})


@pytest.mark.parametrize(("name", "count", "first", "last"), TORCHVISION)
def test_blocks_of_torchvision_s_families(name: str, count: int, first: str, last: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network = torchvision.models.get_model(name, **options)
    blocks = all_blocks(network)
    assert (len(blocks), blocks[0], blocks[-1]) == (count, first, last)


@pytest.mark.parametrize(("name", "stages"), TORCHVISION_STAGES.items())
def test_stages_of_torchvision_s_families(name: str, stages: list[str]) -> None:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, **options).eval()
    with torch.no_grad():
        traced = trace(network, torch.randn(3, 3, 128, 128))
    assert [layer.name for layer in select(network, traced, ["stages"])["stages"]] == stages


@pytest.mark.parametrize(("name", "count"), TIMM.items())
def test_blocks_of_timm_s_families(name: str, count: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert len(all_blocks(network)) == count


@pytest.mark.parametrize(("name", "count"), TRANSFORMERS.items())
def test_blocks_of_transformers_families(name: str, count: int) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")()
    with torch.device("meta"):
        network = getattr(transformers, f"{name}Model")(config)
    assert len(all_blocks(network)) == count
