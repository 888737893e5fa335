"""Exit branches: the parameters that the paper's students have, their shapes, and how they start."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from cka_probe.activations.features import Layout
from cka_probe.activations.hooks import Activation, evaluating
from cka_probe.activations.layers import select
from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import TracedLayer, trace
from cka_probe.distill.branches import MapBranch, TokenBranch, exit_branch


def stage_layers(network: nn.Module, size: int) -> tuple[TracedLayer, ...]:
    with evaluating(network, torch.device("cpu")):
        return select(network, trace(network, torch.randn(3, 3, size, size)), ["stages"])["stages"]


def millions(shapes: list[StageShape], student_width: int, teacher_width: int) -> list[float]:
    branches = [
        exit_branch(shape, len(shapes) - stage, student_width=student_width, teacher_width=teacher_width, classes=100)
        for stage, shape in enumerate(shapes, 1)
    ]
    return [sum(parameter.numel() for parameter in branch.parameters()) / 1e6 for branch in branches]


@pytest.mark.parametrize(
    ("shapes", "width", "expected"),
    [
        ([StageShape("map", 64 * 2**s, (56 >> s, 56 >> s)) for s in range(4)], 512, [0.32, 0.31, 0.25, 0.31]),
        ([StageShape("tokens", 192, (14, 14), 1)] * 4, 192, [1.50, 1.06, 0.61, 0.61]),
        ([StageShape("map_last", 48 * 2**s, (56 >> s, 56 >> s)) for s in range(4)], 384, [6.62, 4.33, 2.11, 1.81]),
        ([StageShape("tokens", 384, (14, 14))] * 4, 384, [5.95, 4.18, 2.40, 2.40]),
    ],
    ids=["ResNet-18", "DeiT-T", "Swin-P", "ResMLP-S12"],
)
def test_branches_have_the_parameters_of_the_specification(
    shapes: list[StageShape], width: int, expected: list[float]
) -> None:
    # 0.0075: rounding to two digits, and ResMLP's 2.406, which is listed as 2.40
    assert millions(shapes, width, 384) == pytest.approx(expected, abs=0.0075)


def test_a_wider_teacher_widens_the_last_convolution_alone() -> None:
    branch = exit_branch(StageShape("map", 64, (8, 8)), 2, student_width=256, teacher_width=768, classes=10)
    assert isinstance(branch, MapBranch)
    widths = [module.out_channels for module in branch.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [64, 64, 64, 128, 128, 128, 128, 768]
    assert branch.classify.in_features == 768


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "size", "kind"),
    [
        ("resnet18", {"num_classes": 10}, 64, "map"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 4}, 64, "tokens"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}, 64, "map_last"),
        ("resmlp_12_224", {"img_size": 64}, 64, "tokens"),
        ("mobilenetv3_small_050", {}, 64, "map"),
    ],
)
def test_branches_of_any_family_give_logits_and_gradients(name: str, options: dict, size: int, kind: str) -> None:
    network = timm.create_model(name, **options)
    layers = stage_layers(network, size)
    shapes = [StageShape.of(layer, (size, size)) for layer in layers]
    assert {shape.kind for shape in shapes} == {kind}
    for stage, (shape, layer) in enumerate(zip(shapes, layers, strict=True), 1):
        branch = exit_branch(shape, len(shapes) - stage, student_width=shapes[-1].channels, teacher_width=32, classes=7)
        activation = torch.randn(2, *layer.shape, requires_grad=True)
        logits = branch(activation)
        assert logits.shape == (2, 7)
        logits.square().sum().backward()
        assert activation.grad is not None
        assert all(parameter.grad is not None for parameter in branch.parameters())


def test_tokens_are_merged_until_the_grid_is_small_and_the_class_token_bypasses() -> None:
    branch = TokenBranch(StageShape("tokens", 12, (17, 15), 1), 3, 12, 5)
    assert len(branch.merge) == 2  # 17 -> 9 -> 5
    assert len(branch.blocks) == 3
    x = torch.randn(2, 1 + 17 * 15, 12)
    seen = {}
    branch.blocks.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    branch(x)
    assert seen["tokens"].shape == (2, 1 + 5 * 4, 12)
    torch.testing.assert_close(seen["tokens"][:, 0], x[:, 0])


def test_merging_sees_two_by_two_neighbours() -> None:
    branch = TokenBranch(StageShape("map_last", 3, (8, 8)), 1, 6, 5)
    x = torch.randn(1, 8, 8, 3)
    before = branch.merge(x)
    x[0, 2:4, 4:6] += 1
    changed = (branch.merge(x) - before).abs().sum(-1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 2]]


def test_branches_start_as_specified() -> None:
    for shape in (StageShape("map", 32, (8, 8)), StageShape("tokens", 64, (14, 14))):
        branch = exit_branch(shape, 1, student_width=64, teacher_width=64, classes=50)
        for module in branch.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2  # PyTorch's, which does not see groups
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                assert (module.weight == 1).all()
            bias = getattr(module, "bias", None)
            assert bias is None or (bias == 0).all()


def test_an_activation_that_is_neither_map_nor_tokens_has_no_shape() -> None:
    layer = TracedLayer("fc", Activation("fc"), "Linear", (10,), Layout(), False)
    assert StageShape.of(layer, (32, 32)) is None
