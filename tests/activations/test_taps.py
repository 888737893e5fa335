"""Taps: activations with their gradients, from copies of a network too, and the traps of in-place operations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import evaluating
from cka_probe.activations.taps import Taps, changed_in_place
from cka_probe.activations.trace import TracedLayer, trace
from cka_probe.errors import NetworkError


class InPlace(nn.Module):
    """The second module writes over the output of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)))


def layer(network: nn.Module, name: str, shape: tuple[int, ...] = (1, 2, 2)) -> TracedLayer:
    with evaluating(network, torch.device("cpu")):
        return next(found for found in trace(network, torch.randn(3, *shape)).layers if found.name == name)


def test_gradients_flow_through_what_is_taken() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2))
    taps = Taps(network, [layer(network, "1")])
    output, (taken,) = taps.run(torch.randn(5, 1, 2, 2))
    assert output.shape == (5, 2)
    taken.sum().backward()
    assert network[1].weight.grad is not None
    assert network[2].weight.grad is None


def test_hooks_come_off_and_hold_nothing_between_passes() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    taps = Taps(network, [layer(network, "1")])
    taps.run(torch.randn(5, 1, 2, 2))
    network(torch.randn(5, 1, 2, 2))
    assert all(not tap.seen for tap in taps._taps)
    taps.remove()
    assert not network[1]._forward_hooks


def test_a_copy_of_the_network_fills_no_tap_of_the_original() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    taps = Taps(network, [layer(network, "1")])
    other = copy.deepcopy(network)
    original = network.forward

    def both(images: Tensor) -> Tensor:
        other(images + 1)
        return original(images)

    network.forward = both  # type: ignore[method-assign]
    images = torch.randn(5, 1, 2, 2)
    output, (taken,) = taps.run(images)
    torch.testing.assert_close(taken, output)


def test_an_activation_that_is_written_over_is_known_and_copied() -> None:
    network = InPlace()
    first = layer(network, "first")
    images = torch.randn(8, 1, 2, 2)
    assert changed_in_place(network, [first], images)
    assert not changed_in_place(network, [layer(network, "second")], images)
    taps = Taps(network, [first])
    taps.keep_copies()
    _, (taken,) = taps.run(images)
    assert (taken < 0).any()
    torch.testing.assert_close(taken, network.first(images.flatten(1)))


def test_a_layer_that_is_not_called_is_named() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    found = layer(network, "1")
    taps = Taps(network, [found])
    network.forward = lambda images: images  # type: ignore[method-assign]
    with pytest.raises(NetworkError, match="must call the layer '1'"):
        taps.run(torch.randn(5, 1, 2, 2))
