"""Selections pick the layers that a reader of the network would name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vgg import VGG
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.nn.utils import parametrize

from cka_probe.activations.blocks import find_blocks
from cka_probe.activations.layers import choose_layers, parse_patterns, select
from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import Trace, trace
from cka_probe.errors import SpecError
from tests.toy_networks import Reused

BLOCKS = {
    "resnet18": 8,
    "resnet50": 16,
    "mobilenetv2_100": 17,
    "convnext_tiny": 18,
    "swin_tiny_patch4_window7_224": 12,
    "deit_tiny_patch16_224": 12,
    "mixer_b16_224": 12,
    "resmlp_12_224": 12,
    "efficientnet_b0": 16,
    "convmixer_768_32": 32,
    "legacy_xception": 12,
    "inception_v3": 11,
    "densenet121": 58,
    "ese_vovnet19b_dw": 4,
    "cait_xxs24_224": 26,
    "regnetx_002": 13,
}

STAGES = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenetv2_100": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "deit_tiny_patch16_224": ["blocks.1", "blocks.3", "blocks.9", "blocks.11"],
}

SMALL_STAGES: list[tuple[str, dict[str, Any], int, list[str], list[int]]] = [
    # Two streams of tokens side by side: the deeper one.
    ("crossvit_tiny_240", {"embed_dim": [24, 48]}, 240,
     ["blocks.0.blocks.1.1", "blocks.0.blocks.1.3", "blocks.2.blocks.1.1", "blocks.2.blocks.1.3"], [196] * 4),
    # Pixels in patches come first of what a block puts out: they share the batch axis, and are no stage.
    ("tnt_s_legacy_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads_outer": 2}, 64,
     ["blocks.1:1", "blocks.3:1", "blocks.9:1", "blocks.11:1"], [16] * 4),
    # The last two blocks put out the class token alone.
    ("cait_xxs24_224", {"img_size": 64, "embed_dim": 48, "num_heads": 2}, 64,
     ["blocks.3", "blocks.7", "blocks.19", "blocks.23"], [16] * 4),
    # Its last block puts out all four resolutions.
    ("coat_tiny", {"img_size": 64}, 64, [f"parallel_blocks.5:{i}" for i in range(4)], [256, 64, 16, 4]),
    # Transformer blocks that see windows, in modules that put out maps.
    ("mobilevit_xxs", {}, 64, ["stages.1", "stages.2", "stages.3", "stages.4"], [256, 64, 16, 4]),
    # A block puts out two tensors, the first its own, the second what it was given.
    ("selecsls42", {}, 64, ["features.1:0", "features.3:0", "features.5:0"], [256, 64, 16]),
    ("efficientvim_m1", {}, 64, ["stages.0.blocks.1:0", "stages.1.blocks.1:0", "stages.2.blocks.1:0"], [16, 4, 1]),
]  # fmt: skip


_LAYERS = ["layer1", "layer2", "layer3", "layer4"]
_SCALES = ["blocks.0", "blocks.2", "blocks.13", "blocks.15"]  # 1, 2, 11 and 2 blocks, as in the papers
VIDEO_STAGES: list[tuple[str, tuple[int, ...], list[str]]] = [
    ("r3d_18", (8, 32, 32), _LAYERS),
    ("mc3_18", (8, 32, 32), _LAYERS),
    ("r2plus1d_18", (8, 32, 32), _LAYERS),
    ("s3d", (16, 64, 64), ["features.6", "features.12", "features.15"]),
    ("swin3d", (8, 64, 64), ["features.0", "features.2", "features.4", "features.6"]),
    ("mvit_v1_b", (16, 64, 64), _SCALES),
    ("mvit_v2_s", (16, 64, 64), _SCALES),
]


def all_blocks(network: nn.Module) -> list[str]:
    return find_blocks(network, {path for path, _ in network.named_modules()})


def dry_run(network: nn.Module, size: int) -> Trace:
    with torch.no_grad():
        return trace(network.eval(), torch.randn(3, 3, size, size))


def picked(network: nn.Module, pattern: str, size: int = 32) -> list[str]:
    return [layer.name for layer in select(network, dry_run(network, size), [pattern])[pattern]]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet18")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), BLOCKS.items())
def test_blocks_of_known_networks_are_counted_right(name: str, count: int) -> None:
    with torch.device("meta"):  # structure alone: no weights, no forward pass
        network = timm.create_model(name)
    assert len(find_blocks(network, {path for path, _ in network.named_modules()})) == count


@pytest.mark.parametrize(("name", "stages"), STAGES.items())
def test_stages_are_the_last_blocks_of_each_resolution_or_fractions_of_a_plain_stack(
    name: str, stages: list[str]
) -> None:
    assert picked(timm.create_model(name), "stages", 224) == stages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "names", "positions"), SMALL_STAGES, ids=[case[0] for case in SMALL_STAGES]
)
def test_stages_put_out_maps_or_tokens(
    name: str, options: dict[str, Any], size: int, names: list[str], positions: list[int]
) -> None:
    network = timm.create_model(name, **options)
    stages = select(network, dry_run(network, size), ["stages"])["stages"]
    shapes = [StageShape.of(layer, (size, size)) for layer in stages]
    assert [layer.name for layer in stages] == names
    assert [shape.positions if shape else 0 for shape in shapes] == positions


def video_network(name: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """One of torchvision's video networks, for videos smaller than those of its weights."""
    video = torchvision.models.video
    network: nn.Module
    if name == "swin3d":
        network = video.SwinTransformer3d([2, 4, 4], 12, [2, 2, 6, 2], [1, 2, 4, 8], [8, 7, 7])
    else:
        whole = video.mvit.MViT
        monkeypatch.setattr(video.mvit, "MViT", lambda **options: whole(**options | {"spatial_size": (64, 64)}))
        network = getattr(video, name)()
    if name == "s3d":
        network.avgpool = nn.AdaptiveAvgPool3d(1)
    return network


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "stages"), VIDEO_STAGES, ids=[case[0] for case in VIDEO_STAGES])
def test_stages_of_video_networks_are_the_last_blocks_of_each_resolution(
    name: str, size: tuple[int, ...], stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = video_network(name, monkeypatch)
    with torch.no_grad():
        traced = trace(network.eval(), torch.randn(3, 3, *size))
    layers = select(network, traced, ["stages"])["stages"]
    assert [layer.name for layer in layers] == stages
    assert {layer.layout.channels_last for layer in layers} == {name == "swin3d"}
    assert {layer.layout.prefix_tokens for layer in layers} == {int(name.startswith("mvit"))}


@pytest.mark.parametrize("size", [32, 64])
def test_dense_layers_are_no_stages_where_there_are_maps(size: int) -> None:
    """VGG's dense layers are convolutions in timm, and linear layers in torchvision."""
    cfg = [4, "M", 4, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"]
    assert picked(VGG(cfg), "stages", size) == ["features.3", "features.8", "features.13", "features.18"]
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.Flatten(), nn.LazyLinear(5))
    flat(torch.zeros(1, 3, size, size))
    assert picked(flat, "stages", size) == ["0", "2"]


def test_the_stages_of_vectors_are_fractions_of_the_depth_without_the_logits() -> None:
    network = nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(192, 192), nn.ReLU()) for _ in range(6)))
    assert picked(nn.Sequential(*network, nn.Linear(192, 5)), "stages", 8) == ["1.0", "2.0", "5.0", "6.0"]
    assert picked(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "stages", 8) == ["1"]


class Excited(nn.Sequential):
    """A squeeze-excitation unit with most of the parameters of the block around it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(nn.Conv2d(width, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, width, 1))
        self.insert(2, nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1)))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Excited(), Excited())


def test_parts_of_a_block_are_no_blocks_whatever_share_of_its_parameters_they_hold() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Excited()

    assert all_blocks(nn.Sequential(nn.Sequential(*(Wrapped() for _ in range(3))))) == ["0.0", "0.1", "0.2"]
    plain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    assert all_blocks(nn.Sequential(nn.Sequential(plain, Wrapped(), Wrapped()))) == ["0.0", "0.1", "0.2"]


def test_stages_give_their_blocks_beside_blocks_of_another_class() -> None:
    network = nn.Sequential(nn.Sequential(Excited(), Stage(), Stage()))
    assert all_blocks(network) == ["0.0", *(f"0.{stage}.blocks.{block}" for stage in (1, 2) for block in (0, 1))]


def test_blocks_in_one_sequence_with_bare_layers_are_found() -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Excited(), nn.MaxPool2d(2), Excited())
    assert all_blocks(nn.ModuleDict({"features": features, "head": nn.Linear(8, 2)})) == ["features.2", "features.4"]


def test_a_plain_network_has_its_weight_layers_for_blocks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert picked(network, "blocks", 8) == ["1", "3", "5"]


def test_a_layer_of_the_user_s_own_counts_as_a_weight_layer() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(192, 192))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.matrix

    network = nn.Sequential(nn.Flatten(), Scale(), nn.ReLU(), Scale())
    assert picked(network, "blocks", 8) == ["1", "3"]


class Packed(nn.Module):
    """A linear layer with integer weights, as of weight-only quantization."""

    weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width, width, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scales).T


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_layers_of_integer_weights_are_weight_layers() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LSTM(8, 8), nn.Linear(8, 8))
    assert all_blocks(torch.ao.quantization.quantize_dynamic(plain)) == ["0", "2", "3"]
    static = nn.Sequential(nnq.Conv2d(3, 4, 3), nnq.ReLU6(), nnq.Conv2d(4, 4, 3, groups=4), nnq.Linear(4, 4))
    assert all_blocks(static) == ["0", "2", "3"]
    assert picked(nn.Sequential(nn.Flatten(), Packed(192), nn.ReLU(), Packed(192)), "blocks", 8) == ["1", "3"]


def test_a_parametrized_layer_is_one_weight_layer() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.up @ self.down

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(8, 8))

    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Scale())
    parametrize.register_parametrization(network[0], "weight", LowRank())
    parametrize.register_parametrization(network[2], "matrix", LowRank())
    assert all_blocks(network) == ["0", "2"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stages_of_quantized_layers_give_their_blocks() -> None:
    network = torchvision.models.SwinTransformer([4, 4], 12, [2, 2, 6, 2], [1, 2, 4, 8], [7, 7])
    assert all_blocks(torch.ao.quantization.quantize_dynamic(network)) == all_blocks(network)


def test_a_block_that_is_never_called_is_not_found() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8))
    assert find_blocks(network, {"1"}) == ["1"]


def test_all_is_every_module_but_the_network_itself(resnet: nn.Module) -> None:
    assert len(picked(resnet, "all")) == 93


def test_a_glob_star_stays_between_dots_and_two_cross_them(resnet: nn.Module) -> None:
    assert picked(resnet, "layer*") == ["layer1", "layer2", "layer3", "layer4"]
    assert picked(resnet, "layer?.1") == ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    assert len(picked(resnet, "**.conv1")) == 8
    assert picked(resnet, "conv1") == ["conv1"]


def test_a_type_matches_the_class_and_those_derived_from_it(resnet: nn.Module) -> None:
    assert len(picked(resnet, "type:Conv2d")) == 20
    assert len(picked(resnet, "type:_ConvNd")) == 20
    assert len(picked(resnet, "type:Basic*")) == 8


def test_one_call_of_a_module_can_be_named() -> None:
    assert picked(Reused(), "act[1]", 8) == ["act[1]"]
    assert picked(Reused(), "act", 8) == ["act[0]", "act[1]"]


def test_layers_keep_forward_order_whatever_the_order_of_the_patterns(resnet: nn.Module) -> None:
    (chosen,) = choose_layers([("net", resnet, dry_run(resnet, 32))], ["fc", "layer2", "conv1"])
    assert [layer.name for layer in chosen] == ["conv1", "layer2", "fc"]


def test_a_pattern_may_match_in_one_subject_only(resnet: nn.Module) -> None:
    mine = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8))
    subjects = [("cnn", resnet, dry_run(resnet, 32)), ("mlp", mine, dry_run(mine, 32))]
    assert [len(chosen) for chosen in choose_layers(subjects, ["layer*", "1"])] == [4, 1]
    with pytest.raises(SpecError, match="No layer of 'mlp' matches 'layer\\*'"):
        choose_layers(subjects, ["layer*"])


def test_a_pattern_that_matches_nothing_names_the_close_ones(resnet: nn.Module) -> None:
    subjects = [("cnn", resnet, dry_run(resnet, 32))]
    with pytest.raises(SpecError, match=r"No layer of 'cnn' matches 'layer5'. Close names: 'layer\d'"):
        choose_layers(subjects, ["layer4", "layer5"])
    with pytest.raises(SpecError, match=r"matches 'type:Conv3d'. Close names: 'type:Conv2d'"):
        choose_layers(subjects, ["type:Conv3d"])
    with pytest.raises(SpecError, match=r"matches 'type:Q'. Close names: 'type:\w+', "):
        choose_layers(subjects, ["type:Q"])
    with pytest.raises(SpecError, match=r"'\*\*' crosses them"):
        choose_layers(subjects, ["*.conv1"])


def test_a_pattern_that_names_only_modules_never_called_says_why() -> None:
    network = Reused()
    with pytest.raises(SpecError, match="'unused' can be compared: never called"):
        choose_layers([("net", network, dry_run(network, 8))], ["unused"])


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    network = Reused()
    with caplog.at_level("INFO", "cka_probe"):
        choose_layers([("net", network, dry_run(network, 8))], ["all"])
    assert "net: left out, never called: unused" in caplog.text


def test_patterns_are_split_at_commas_and_must_not_be_empty() -> None:
    assert parse_patterns(" a , b.* ") == parse_patterns(["a", "b.*"]) == ("a", "b.*")
    with pytest.raises(SpecError, match="at least one"):
        parse_patterns(" , ")
