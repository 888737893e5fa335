"""L2G: any stage of one network comes out as any stage of another puts it out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.distill.assistant.l2g import LocalToGlobal

SHAPES = {
    "map": StageShape("map", 8, (4, 6)),
    "tokens": StageShape("tokens", 12, (2, 3)),
    "class token": StageShape("tokens", 12, (2, 3), prefix_tokens=1),
    "two prefix tokens": StageShape("tokens", 10, (5, 5), prefix_tokens=2),
    "map_last": StageShape("map_last", 96, (3, 4)),
    "one pixel": StageShape("map", 5, (1, 1)),
    "large": StageShape("map", 4, (14, 14)),
}


def activation(shape: StageShape) -> Tensor:
    sizes = {
        "map": (shape.channels, *shape.grid),
        "map_last": (*shape.grid, shape.channels),
        "tokens": (shape.prefix_tokens + shape.positions, shape.channels),
    }
    return torch.randn(2, *sizes[shape.kind])


@pytest.mark.parametrize("source", SHAPES)
@pytest.mark.parametrize("target", SHAPES)
def test_the_shape_of_the_target_comes_out_and_all_weights_learn(source: str, target: str) -> None:
    l2g = LocalToGlobal(SHAPES[source], SHAPES[target])
    out = l2g(activation(SHAPES[source]))
    assert out.shape == activation(SHAPES[target]).shape
    out.square().sum().backward()
    unused = [name for name, weight in l2g.named_parameters() if weight.grad is None]
    assert not unused


@pytest.mark.parametrize(("grids", "kernel"), [((8, 4), 2), ((6, 6), 1), ((7, 4), 1), ((2, 4), 1), ((12, 4), 3)])
def test_the_kernel_is_the_ratio_of_the_grids_where_that_is_whole(grids: tuple[int, int], kernel: int) -> None:
    before, behind = (StageShape("map", 4, (side, side)) for side in grids)
    embed = LocalToGlobal(before, behind).embed
    assert embed.kernel_size == embed.stride == (kernel, kernel)


def test_prefix_tokens_come_first_and_are_the_same_for_each_image() -> None:
    l2g = LocalToGlobal(SHAPES["map"], SHAPES["class token"])
    out = l2g(activation(SHAPES["map"]))
    assert isinstance(l2g.prefix, nn.Parameter)
    assert torch.equal(out[:, 0], l2g.prefix[0].expand(2, -1))
    assert not torch.equal(out[0, 1:], out[1, 1:])


def test_images_are_not_mixed() -> None:
    l2g = LocalToGlobal(SHAPES["large"], SHAPES["tokens"]).double()
    x = activation(SHAPES["large"]).double()
    torch.testing.assert_close(l2g(x)[:1], l2g(x[:1]))


def test_the_prefix_tokens_of_the_source_are_left_out() -> None:
    l2g = LocalToGlobal(SHAPES["class token"], SHAPES["map"])
    x = activation(SHAPES["class token"])
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(l2g(x), l2g(other))
