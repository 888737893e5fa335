"""A dry run tells which activations there are, in which order, and where their examples lie."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from cka_probe.activations.features import Layout, as_features
from cka_probe.activations.hooks import capture
from cka_probe.activations.trace import Trace, trace
from cka_probe.errors import NetworkError
from tests.toy_networks import Outputs, Reused, Windows


def traced(network: nn.Module, size: int = 8) -> Trace:
    with torch.no_grad():
        return trace(network.eval(), torch.randn(3, 3, size, size))


def names(found: Trace) -> list[str]:
    return [layer.name for layer in found.layers]


def test_layers_come_in_forward_order_with_containers_after_their_children() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten())
    assert names(traced(network)) == ["0.0", "0.1", "0", "1", ""]


def test_a_module_called_twice_has_numbered_calls_and_one_never_called_is_left_out() -> None:
    found = traced(Reused())
    assert names(found) == ["first", "act[0]", "second", "act[1]", ""]
    assert found.left_out == {"unused": "never called"}


def test_an_in_place_activation_is_no_alias_of_what_it_overwrote() -> None:
    alias = {layer.name: layer.alias for layer in traced(Reused()).layers}
    assert alias == {"first": False, "act[0]": False, "second": False, "act[1]": False, "": True}


def test_outputs_that_are_no_bare_tensor_are_named_by_their_path_where_there_are_several() -> None:
    found = traced(Outputs())
    assert names(found) == ["as_tuple:0", "as_tuple:2", "as_list", "as_dict", "named", ""]
    assert found.left_out == {"integers": "its output is not floating-point"}


def test_parts_that_share_the_batch_axis_go_back_to_their_images() -> None:
    network, images = Windows().eval(), torch.randn(5, 3, 8, 8)
    layers = {layer.name: layer for layer in traced(network).layers}
    assert layers["side_by_side"].layout == Layout(parts=2)
    assert layers["apart"].layout == Layout(parts=2, parts_first=True)
    assert layers["sequence_first"].layout.batch_axis == 1
    features = {}

    def keep(which, x):  # type: ignore[no-untyped-def]
        features[which.module] = as_features(x, layers[which.module].layout)

    with torch.no_grad(), capture(network, ["side_by_side", "apart", "sequence_first"], keep):
        network(images)
    for (
        x
    ) in features.values():  # the same values in another order: the squared norm of each image is that of its pixels
        torch.testing.assert_close(x.square().sum(1), images.flatten(1).square().sum(1))


def test_a_layer_that_mixes_the_examples_is_left_out() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.own = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean(x.mean(0))
            return self.own(x)

    found = traced(Mixing())
    assert names(found) == ["own", ""]
    assert found.left_out == {"mean": "its output does not have the examples along one axis"}


def test_the_layouts_of_timm_s_transformers_are_known() -> None:
    deit = traced(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1), 32)
    block = next(layer for layer in deit.layers if layer.name == "blocks.0")
    assert (block.shape, block.layout.prefix_tokens) == ((17, 192), 1)
    swin = traced(timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4), 64)
    stage = next(layer for layer in swin.layers if layer.name == "layers.0")
    assert (stage.shape, stage.layout.channels_last) == ((16, 16, 96), True)


def test_a_network_that_cannot_see_the_images_says_so() -> None:
    with pytest.raises(NetworkError, match=r"images of shape \(3, 8, 8\), but raised RuntimeError"):
        traced(nn.Conv2d(1, 1, 3))
