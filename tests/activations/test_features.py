"""Activations of every layout -> (n, d), and the layouts that two shapes tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cka_probe.activations.features import Layout, Pool, Prefix, as_features, infer_layout
from cka_probe.estimation.gram import Features, Way
from cka_probe.estimation.kernels import linear_gram
from cka_probe.estimation.precision import Precision


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    # Float64 means and inner products of a few hundred terms of order 1.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# as_features keeps every value


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5,), Layout()),
        ((5, 7), Layout()),
        ((5, 9, 8), Layout(prefix_tokens=1)),
        ((5, 8, 3, 4), Layout()),
        ((5, 3, 4, 8), Layout(channels_last=True)),
        ((5, 2, 3, 4, 6), Layout()),
    ],
)
def test_unpooled_features_are_the_examples_flattened(shape: tuple[int, ...], layout: Layout) -> None:
    activation = normal(*shape)
    assert torch.equal(as_features(activation, layout), activation.reshape(5, -1))


def test_the_default_is_to_keep_every_value_of_a_batch_first_activation() -> None:
    activation = normal(5, 8, 3, 4)
    assert torch.equal(as_features(activation), as_features(activation, Layout(), "none"))


def test_sequence_first_tokens_are_taken_by_example() -> None:
    activation = normal(9, 5, 8)
    features = as_features(activation, Layout(batch_axis=1))
    assert features.shape == (5, 72)
    close(linear_gram(features), linear_gram(activation.transpose(0, 1).reshape(5, -1)))


@pytest.mark.parametrize("pool", ["none", "mean", "cls"])
def test_windows_side_by_side_join_their_example(pool: Pool) -> None:
    windows = normal(5, 4, 6, 8)  # example, window, token, channel
    features = as_features(windows.reshape(20, 6, 8), Layout(parts=4), pool)
    expected = windows.reshape(5, -1) if pool == "none" else windows.mean((1, 2))
    close(features, expected)


@pytest.mark.parametrize("pool", ["none", "mean", "cls"])
def test_windows_a_batch_apart_join_their_example(pool: Pool) -> None:
    windows = normal(4, 5, 6, 8)  # window, example, token, channel
    features = as_features(windows.reshape(20, 6, 8), Layout(parts=4, parts_first=True), pool)
    by_example = windows.transpose(0, 1)
    if pool == "none":
        close(linear_gram(features), linear_gram(by_example.reshape(5, -1)))
    else:
        close(features, by_example.mean((1, 2)))


@pytest.mark.parametrize("parts_first", [False, True])
def test_windows_that_are_vectors_or_maps_are_averaged_over_windows_and_space(parts_first: bool) -> None:
    windows = normal(5, 4, 8, 3, 3)  # example, window, channel, height, width
    laid_out = windows.transpose(0, 1) if parts_first else windows
    layout = Layout(parts=4, parts_first=parts_first)
    maps = as_features(laid_out.reshape(20, 8, 3, 3), layout, "mean")
    close(maps, windows.mean((1, 3, 4)))
    vectors = as_features(laid_out[..., 0, 0].reshape(20, 8), layout, "mean")
    close(vectors, windows[..., 0, 0].mean(1))


@pytest.mark.slow
@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(data=st.data(), ndim=st.integers(1, 5))
def test_flattening_never_changes_the_gram(data: st.DataObject, ndim: int) -> None:
    """Whatever axis the examples lie on and whatever the order of memory."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=ndim - 1, max_size=ndim - 1))
    by_example = normal(5, *shape, seed=data.draw(st.integers(0, 99)))
    memory = data.draw(st.permutations(range(ndim)))
    stored = by_example.permute(memory).contiguous().permute(torch.tensor(memory).argsort().tolist())
    axis = data.draw(st.integers(0, ndim - 1))
    features = as_features(stored.movedim(0, axis), Layout(batch_axis=axis))
    flat = by_example.reshape(5, -1)
    assert features.shape == flat.shape
    close(linear_gram(features), linear_gram(flat))


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(shape=st.lists(st.integers(1, 4), max_size=3), parts=st.integers(2, 4), parts_first=st.booleans())
def test_joining_windows_never_changes_the_gram(shape: list[int], parts: int, parts_first: bool) -> None:
    by_example = normal(5, parts, *shape)
    laid_out = by_example.transpose(0, 1) if parts_first else by_example
    features = as_features(laid_out.reshape(5 * parts, *shape), Layout(parts=parts, parts_first=parts_first))
    close(linear_gram(features), linear_gram(by_example.reshape(5, -1)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_flattened_without_a_copy(memory_format: torch.memory_format) -> None:
    activation = normal(5, 8, 3, 4).contiguous(memory_format=memory_format)
    assert as_features(activation).data_ptr() == activation.data_ptr()


@pytest.mark.parametrize("pool", ["none", "mean", "cls"])
def test_as_features_leaves_the_activation_alone(pool: Pool) -> None:
    activation = normal(5, 9, 8)
    before = activation.clone()
    as_features(activation, Layout(prefix_tokens=1), pool)
    assert torch.equal(activation, before)


def test_features_keep_the_dtype_of_the_activation() -> None:
    for pool in ("none", "mean", "cls"):
        assert as_features(normal(5, 9, 8).bfloat16(), Layout(), pool).dtype == torch.bfloat16


# as_features pools


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_vectors_have_nothing_to_pool(shape: tuple[int, ...], pool: Pool) -> None:
    activation = normal(*shape)
    assert torch.equal(as_features(activation, Layout(), pool), activation.reshape(5, -1))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_maps_are_averaged_over_space(pool: Pool) -> None:
    first, last = normal(5, 8, 3, 4), normal(5, 3, 4, 8)
    close(as_features(first, Layout(), pool), first.mean((2, 3)))
    close(as_features(last, Layout(channels_last=True), pool), last.mean((1, 2)))


def test_maps_with_more_axes_are_averaged_over_all_of_them() -> None:
    first, last = normal(5, 8, 2, 3, 4), normal(5, 2, 3, 4, 8)
    close(as_features(first, Layout(), "mean"), first.mean((2, 3, 4)))
    close(as_features(last, Layout(channels_last=True), "mean"), last.mean((1, 2, 3)))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_mean_of_tokens_leaves_the_prefix_out(prefix: int) -> None:
    tokens = normal(5, 16 + prefix, 8)
    close(as_features(tokens, Layout(prefix_tokens=prefix), "mean"), tokens[:, prefix:].mean(1))


@pytest.mark.parametrize("prefix", [1, 5])
def test_cls_takes_the_first_token_where_there_is_a_prefix(prefix: int) -> None:
    tokens = normal(5, 16 + prefix, 8)
    assert torch.equal(as_features(tokens, Layout(prefix_tokens=prefix), "cls"), tokens[:, 0])


def test_cls_takes_the_mean_where_there_is_no_class_token() -> None:
    tokens = normal(5, 16, 8)
    close(as_features(tokens, Layout(), "cls"), tokens.mean(1))


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("prefix", [1, 2])
def test_prefix_tokens_alone_give_the_class_token(prefix: int, pool: Pool) -> None:
    tokens = normal(5, prefix, 8)
    assert torch.equal(as_features(tokens, Layout(prefix_tokens=prefix), pool), tokens[:, 0])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_sequence_first_tokens_are_pooled_over_the_sequence(pool: Pool) -> None:
    tokens = normal(17, 5, 8)
    expected = tokens[1:].mean(0) if pool == "mean" else tokens[0]
    features = as_features(tokens, Layout(batch_axis=1, prefix_tokens=1), pool)
    close(features, expected)


# Features


def test_features_compute_their_gram_once() -> None:
    features = Features(normal(6, 4))
    assert features.gram is features.gram
    assert torch.equal(features.gram, linear_gram(features.x))


@pytest.mark.parametrize(
    ("offset", "spread", "way"), [(0.0, 1.0, "uncentered"), (1e3, 1.0, "centered"), (1.0, 2e-6, "exact")]
)
def test_a_gram_is_made_by_the_fastest_way_that_is_precise(offset: float, spread: float, way: Way) -> None:
    x = (offset + spread * normal(64, 300)).float()
    found = Features(x)
    again = Features(x, way=way)
    unseen = Features(x, way="uncentered", wait=False)
    assert found.gram is not None
    assert found.way == way
    assert torch.equal(again.gram, found.gram)
    assert unseen.gram.dtype == torch.float32
    assert unseen.unseen is not None
    assert unseen.unseen.is_precise() == (way == "uncentered")
    assert again.unseen is None


def test_a_batch_that_nobody_waited_for_is_told_when_float32_was_too_little() -> None:
    precision = Precision()
    for offset in (0.0, 1e3):
        features = precision.features(7, (offset + normal(64, 300)).float())
        if offset:
            features = Features(features.x, way="uncentered", wait=False)  # as on a GPU
        assert features.gram is not None
        precision.note(7, features)
        precision.end_batch()
        assert precision.ways == {7: "uncentered"}
        assert precision.doubtful == ({7} if offset else set())


# infer_layout


def inferred(
    shape: Sequence[int], *, axis: int = 0, image_size: tuple[int, int] = (224, 224), prefix_tokens: int = 0,
    channels_last: bool = False,
) -> Layout | None:  # fmt: skip
    """The layout of an activation whose shape for one image is given, its axis of examples growing from there."""
    small, large = ([size * (n if which == axis else 1) for which, size in enumerate(shape)] for n in (2, 3))
    return infer_layout(small, large, image_size=image_size, prefix=Prefix(prefix_tokens), channels_last=channels_last)


@pytest.mark.parametrize("shape", [(1,), (1, 1000), (1, 196, 768), (1, 64, 56, 56), (1, 8, 4, 7, 7)])
def test_examples_along_the_first_axis(shape: tuple[int, ...]) -> None:
    assert inferred(shape) == Layout()


def test_examples_along_the_second_axis_of_a_sequence_first_network() -> None:
    assert inferred((196, 1, 768), axis=1) == Layout(batch_axis=1)
    assert inferred((197, 1, 768), axis=1, prefix_tokens=1) == Layout(batch_axis=1, prefix_tokens=1)


def test_windows_along_the_axis_of_examples_are_parts_of_one() -> None:
    assert inferred((64, 49, 96)) == Layout(parts=64)
    assert inferred((4, 96, 7, 7)) == Layout(parts=4)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((1, 512, 7, 7), False),
        ((1, 7, 7, 512), True),
        ((1, 3, 224, 224), False),
        ((1, 512, 1, 1), False),
        ((1, 1, 1, 512), True),
        ((1, 12, 197, 197), False),
    ],
)
def test_channels_are_where_the_other_axes_have_the_shape_of_the_images(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    for told in (False, True):
        assert inferred(shape, channels_last=told) == Layout(channels_last=channels_last)


@pytest.mark.parametrize("told", [False, True])
def test_channels_of_a_cube_are_where_the_network_says(told: bool) -> None:
    assert inferred((1, 7, 7, 7), channels_last=told) == Layout(channels_last=told)


@pytest.mark.parametrize("image_size", [(224, 160), (160, 224)])
@pytest.mark.parametrize("stride", [4, 16, 32])
def test_maps_of_images_that_are_not_square(image_size: tuple[int, int], stride: int) -> None:
    rows, columns = image_size[0] // stride, image_size[1] // stride
    assert inferred((1, 96, rows, columns), image_size=image_size) == Layout()
    assert inferred((1, rows, columns, 96), image_size=image_size) == Layout(channels_last=True)


@pytest.mark.parametrize("rounded", [(7, 4), (7, 3)])
def test_maps_may_round_the_stride_up_or_down(rounded: tuple[int, int]) -> None:
    assert inferred((1, *rounded, 96), image_size=(224, 112)) == Layout(channels_last=True)
    assert inferred((1, 96, *rounded), image_size=(224, 112)) == Layout()


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("image_size", [(224, 224), (224, 160), (160, 224), (32, 256)])
def test_a_prefix_is_there_where_the_other_tokens_fill_the_image(image_size: tuple[int, int], prefix: int) -> None:
    patches = (image_size[0] // 16) * (image_size[1] // 16)
    assert inferred((1, patches + prefix, 768), image_size=image_size, prefix_tokens=prefix) == Layout(
        prefix_tokens=prefix
    )


@pytest.mark.parametrize("image_size", [(224, 224), (384, 384), (224, 160)])
def test_tokens_to_which_a_network_adds_its_class_token_later_have_no_prefix(image_size: tuple[int, int]) -> None:
    patches = (image_size[0] // 16) * (image_size[1] // 16)  # as in CaiT
    assert inferred((1, patches, 768), image_size=image_size, prefix_tokens=1) == Layout()


@pytest.mark.parametrize("prefix", [1, 2])
def test_a_class_token_alone_is_a_prefix(prefix: int) -> None:
    assert inferred((1, prefix, 768), prefix_tokens=prefix) == Layout(prefix_tokens=prefix)


def test_tokens_of_a_network_without_a_class_token_have_no_prefix() -> None:
    assert inferred((1, 198, 768)) == Layout()


def test_vectors_and_maps_have_no_prefix() -> None:
    assert inferred((1, 768), prefix_tokens=1) == Layout()
    assert inferred((1, 768, 14, 14), prefix_tokens=1) == Layout()


@pytest.mark.parametrize("image_size", [(100, 60), (480, 300), (300, 480)])
def test_a_prefix_is_found_where_patches_leave_a_margin_of_the_image(image_size: tuple[int, int]) -> None:
    patches = (image_size[0] // 16) * (image_size[1] // 16)  # 16 does not divide both sides
    assert inferred((1, patches + 1, 768), image_size=image_size, prefix_tokens=1) == Layout(prefix_tokens=1)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        pytest.param((1, 196, 768), (1, 196, 768), id="parameters"),
        pytest.param((), (), id="a scalar"),
        pytest.param((2, 2), (3, 3), id="two growing axes"),
        pytest.param((5, 8), (6, 8), id="one row more than the examples"),
        pytest.param((4, 8), (9, 8), id="pairs of examples"),
        pytest.param((3, 8), (2, 8), id="a shrinking axis"),
        pytest.param((2, 8), (3, 8, 1), id="another number of axes"),
        pytest.param((0, 8), (0, 8), id="nothing"),
    ],
)
def test_an_activation_without_one_axis_of_examples_has_no_layout(small: Sequence[int], large: Sequence[int]) -> None:
    assert infer_layout(small, large, image_size=(224, 224)) is None


# together


@pytest.mark.parametrize(
    ("shape", "axis", "channels"),
    [
        ((1, 16, 8), 0, 8),
        ((16, 1, 8), 1, 8),
        ((1, 8, 4, 4), 0, 8),
        ((1, 4, 4, 8), 0, 8),
        ((6, 4, 8), 0, 8),
        ((1, 8), 0, 8),
    ],
)
def test_an_inferred_layout_gives_one_row_an_example(shape: tuple[int, ...], axis: int, channels: int) -> None:
    layout = inferred(shape, axis=axis, image_size=(32, 32))
    assert layout is not None
    batch = normal(*(size * (5 if which == axis else 1) for which, size in enumerate(shape)))
    assert as_features(batch, layout).shape == (5, batch.numel() // 5)
    assert as_features(batch, layout, "mean").shape == (5, channels)


def test_register_tokens_are_left_out_and_are_no_class_token() -> None:
    tokens = normal(5, 20, 8)
    for prefix, first in ((Prefix(1, 4), 5), (Prefix(0, 4), 4), (Prefix(2, 0), 2)):
        shape = (2, 16 + first, 8), (3, 16 + first, 8)
        layout = infer_layout(*shape, image_size=(32, 32), prefix=prefix)
        assert layout == Layout(prefix_tokens=first, class_token=prefix.class_tokens > 0)
    close(as_features(tokens, Layout(prefix_tokens=4, class_token=False), "cls"), tokens[:, 4:].mean(1))
    close(as_features(tokens[:, :4], Layout(prefix_tokens=4, class_token=False), "mean"), tokens[:, :4].mean(1))


def test_registers_may_come_later_than_the_class_token() -> None:
    found = [
        infer_layout((2, count, 8), (3, count, 8), image_size=(32, 32), prefix=Prefix(1, 4))
        for count in (16, 17, 20, 21)
    ]
    assert [layout and (layout.prefix_tokens, layout.class_token) for layout in found] == [
        (0, True), (1, True), (4, False), (5, True),
    ]  # fmt: skip


def test_one_token_more_than_a_grid_is_a_class_token() -> None:
    assert inferred((1, 65, 8)) == Layout(prefix_tokens=1)
    assert inferred((1, 64, 8)) == Layout()
    assert inferred((1, 5, 8)) == Layout(prefix_tokens=1)
    assert inferred((1, 3, 8)) == Layout()
