"""Selections pick the layers that a reader of the network would name."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from cka_probe.blocks import find_blocks
from cka_probe.errors import SpecError
from cka_probe.layers import choose_layers, parse_patterns, select
from cka_probe.trace import Trace, trace
from tests.networks import Reused

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


def dry_run(network: nn.Module, size: int) -> Trace:
    with torch.no_grad():
        return trace(network.eval(), torch.randn(3, 3, size, size))


def picked(network: nn.Module, pattern: str, size: int = 32) -> list[str]:
    return [layer.name for layer in select(network, dry_run(network, size), [pattern])[pattern]]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet18")


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


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 8), ("swin_t", 12), ("vit_b_16", 12), ("efficientnet_b0", 16), ("vgg11", 11)]
)
def test_blocks_are_found_in_torchvision_s_networks_too(name: str, count: int) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    assert len(find_blocks(network, {path for path, _ in network.named_modules()})) == count


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
