"""Hooks hand over each activation at once, and always come off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cka_probe.activations.hooks import Activation, Latest, capture, evaluating, tensors_in
from tests.toy_networks import Outputs, Pair, Reused


def hooks_on(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_a_later_in_place_operation_does_not_change_what_was_received() -> None:
    network, images = Reused().eval(), torch.randn(2, 3, 6, 6)
    received: dict[Activation, Tensor] = {}
    with torch.no_grad(), capture(network, ["first"], lambda which, x: received.update({which: x.clone()})):
        network(images)
    expected = network.first(images)
    assert (expected < 0).any(), "the ReLU must have something to spoil"
    torch.testing.assert_close(received[Activation("first")], expected)


def test_each_call_of_a_module_is_told_apart_and_counted_anew_in_each_forward_pass() -> None:
    network, received = Reused().eval(), []
    with torch.no_grad(), capture(network, ["act"], lambda which, _: received.append(which)):
        network(torch.randn(2, 3, 6, 6))
        network(torch.randn(2, 3, 6, 6))
    assert received == [Activation("act", 0), Activation("act", 1)] * 2


def test_tensors_are_found_in_tuples_lists_mappings_named_tuples_and_dataclasses() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert list(tensors_in(a)) == [("", a)]
    assert [path for path, _ in tensors_in((a, None, [b]))] == ["0", "2.0"]
    assert [path for path, _ in tensors_in({"x": {"y": a}})] == ["x.y"]
    assert [path for path, _ in tensors_in(Pair(a, b))] == ["features", "indices"]
    assert list(tensors_in("no tensor")) == []


def test_nested_outputs_are_received_by_path() -> None:
    received = []
    with capture(network := Outputs(), ["as_tuple", "as_dict"], lambda which, _: received.append(which)):
        network(torch.randn(2, 3, 4, 4))
    assert {(which.module, which.output) for which in received} == {
        ("as_tuple", "0"), ("as_tuple", "2"), ("as_dict", "logits"), ("as_dict", "loss"),
    }  # fmt: skip


def test_hooks_come_off_when_the_block_ends() -> None:
    network = Reused()
    with capture(network, ["first", "act"], lambda *_: None):
        assert hooks_on(network) == 3
    assert hooks_on(network) == 0


def test_hooks_come_off_when_the_forward_pass_raises() -> None:
    network = Reused()
    with pytest.raises(RuntimeError), capture(network, ["first"], lambda *_: None):
        network(torch.randn(2, 5, 6, 6))
    assert hooks_on(network) == 0


def test_hooks_come_off_when_a_name_is_unknown() -> None:
    network = Reused()
    with pytest.raises(AttributeError), capture(network, ["first", "nowhere"], lambda *_: None):
        pass
    assert hooks_on(network) == 0


def test_hooks_of_the_caller_stay() -> None:
    network, called = Reused(), []
    network.first.register_forward_hook(lambda *_: called.append("own"))
    with capture(network, ["first"], lambda *_: called.append("ours")):
        network(torch.randn(1, 3, 4, 4))
    network(torch.randn(1, 3, 4, 4))
    assert called == ["own", "ours", "own"]


def test_a_network_gets_its_own_training_flags_back() -> None:
    network = Reused().train()
    network.second.eval()
    with evaluating(network, torch.device("cpu")):
        assert not any(module.training for module in network.modules())
        assert not network.first(torch.randn(1, 3, 4, 4)).requires_grad
    assert [network.training, network.first.training, network.second.training] == [True, True, False]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_tensor_is_known_again_until_it_changes_in_place() -> None:
    latest, x = Latest(), torch.randn(3)
    assert not latest.holds(x)
    latest.hold(x)
    assert latest.holds(x)
    assert not latest.holds(x.clone())
    x.relu_()
    assert not latest.holds(x)
    latest.hold(x)
    latest.release()
    assert not latest.holds(x)


def test_an_inference_tensor_is_never_known_again() -> None:
    with torch.inference_mode():
        x = torch.randn(3)
    latest = Latest()
    latest.hold(x)
    assert not latest.holds(x)
