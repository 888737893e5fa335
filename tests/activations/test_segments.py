"""A network cut behind a stage: equal to it in both modes, made of its own modules, or refused with a reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cka_probe.activations.cutting.recordings import MOST_KEPT
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.segments import Crossing, Head, Tail, cut
from cka_probe.errors import NetworkError, SpecError

Forward = Callable[[Any, Tensor], Any]


class Swap(nn.Module):
    """Changes the list that it gets, as HRNet's stages do."""

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps[0] = maps[1] - maps[0]
        return maps


class Parts(nn.Module):
    """Parts of a small network; what its forward pass does with them is given."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.run = run
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act, self.last = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 5)
        self.position, self.drop_rate, self.mask = nn.Parameter(torch.rand(4, 1, 1)), 0.5, torch.rand(4, 1, 1)
        self.register_buffer("scale", torch.rand(1))
        self.register_buffer("steps", torch.zeros(1))
        self.swap = Swap()
        self.count = 0

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def rest(self, y: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.second(y)).mean((2, 3)))
        return out


def images(count: int = 3, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count + side))


def assert_equal(network: nn.Module, head: Head, tail: Tail, x: Tensor) -> None:
    """Outputs bit for bit, gradients, buffers afterwards; in evaluation and training mode with one seed."""
    for training in (False, True, False):
        network.train(training)
        state = copy.deepcopy(network.state_dict())
        parameters = list(network.parameters())
        results = []
        for run in (network, lambda x: tail(head(x))):
            network.load_state_dict(state)
            torch.manual_seed(5)
            output = run(x.clone())
            gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
            results.append([output, torch.rand(1), *network.buffers(), *gradients])
            results[-1] = [None if value is None else value.detach().clone() for value in results[-1]]
        for expected, found in zip(*results, strict=True):
            assert (expected is None) == (found is None)
            assert expected is None or torch.equal(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "options"),
    [
        ("resnet10t", "layer2", {"drop_path_rate": 0.3, "drop_rate": 0.3}),
        ("test_vit", "blocks.1", {"drop_path_rate": 0.3, "drop_rate": 0.3, "pos_drop_rate": 0.3, "img_size": 32}),
        ("test_convnext", "stages.1", {"drop_path_rate": 0.3, "drop_rate": 0.3}),
        ("test_efficientnet", "blocks.1", {"drop_path_rate": 0.3, "drop_rate": 0.3}),
    ],
)
def test_timm_networks_with_droppath_and_dropout(name: str, stage: str, options: dict[str, Any]) -> None:
    network = timm.create_model(name, **options)
    head, tail = cut(network, stage, images(2, 32))
    assert_equal(network, head, tail, images(3, 32))


FORWARDS: dict[str, Forward] = {
    "flag": lambda s, x: s.rest(F.dropout(s.first(x), s.drop_rate, s.training)),
    "branch": lambda s, x: s.rest(s.first(x) * (2 if s.training else 3)),
    "buffers": lambda s, x: s.rest(s.first(x) * s.scale + s.mask + s.position),
    "statistics": lambda s, x: (s.steps.add_(1), s.rest(s.first(x) * s.steps))[1],
    "skip": lambda s, x: s.rest(s.act(s.first(x)) + x.mean(1, keepdim=True)),
    "in place": lambda s, x: s.rest(s.first(x).mul_(2)),
    "random": lambda s, x: s.rest(s.first(x) * torch.rand(x.shape[0], 1, 1, 1, device=x.device)),
    "sizes": lambda s, x: F.interpolate(s.rest(s.first(x))[:, :, None, None], x.shape[-2:]).flatten(1),
    "square root": lambda s, x: s.rest(s.first(x) * math.sqrt(x.shape[-1])),
    "grid": lambda s, x: s.rest(s.first(x) + torch.arange(x.shape[-1], device=x.device)),
    "loop": lambda s, x: s.rest(sum(y * k for y in [s.first(x)] for k in range(x.shape[1]))),
    "unpacked": lambda s, x: s.rest(s.first(x).reshape(len(x), *s.mask.shape[:1], *x.shape[2:])),
    "type": lambda s, x: s.rest(s.first(x) if isinstance(x, Tensor) else x[0]),
    "list": lambda s, x: s.rest(s.swap([s.first(x), s.second(s.position + x[:, :1])])[0]),
    "constant": lambda s, x: s.rest(s.first(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]),
    "detached": lambda s, x: s.rest(s.first(x).detach()),
    "sequence": lambda s, x: s.last(nn.Sequential(s.first, s.second, s.act)[:2](x).mean((2, 3))),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_what_a_forward_pass_may_do(forward: Forward) -> None:
    network = Parts(forward)
    head, tail = cut(network, "first", images())
    for batch in (images(), images(5), images(2, 9)):
        assert_equal(network, head, tail, batch)


def even(s: Any, x: Tensor) -> Tensor:
    y = s.first(x)
    return s.rest(y if x.shape[-1] % 2 else y * 2)


def without_gradients(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = s.first(x)
    return s.rest(y)


def counting(s: Any, x: Tensor) -> Tensor:
    s.count += 1
    return s.rest(s.first(x))


def keeping(s: Any, x: Tensor) -> Tensor:
    s.kept = s.first(x)
    return s.rest(s.kept)


def writing_over_a_view(s: Any, x: Tensor) -> Tensor:
    doubled = x * 2
    view, y = doubled.flatten(1), s.first(x)
    doubled.add_(1)
    return s.rest(y) + view.mean()


REFUSED: dict[str, tuple[Forward, str]] = {
    "values": (lambda s, x: s.rest(s.first(x) if x.mean() > 0 else s.first(2 * x)), "depends on the values"),
    "item": (lambda s, x: s.rest(s.first(x) if x.mean().item() > 9 else s.first(x) * 2), "depends on the values"),
    "twice": (lambda s, x: s.rest(s.first(x) + s.first(x)), r"2 times; name the call, one of 'first\[0\]', 'first\[1"),
    "never": (lambda s, x: s.last(x.mean((2, 3)).repeat(1, 2)[:, :4]), "never calls"),
    "gradient mode": (without_gradients, "changes gradient mode"),
    "attribute": (counting, "sets its own attribute 'Parts.count'"),
    "activation kept": (keeping, "sets its own attribute 'Parts.kept'"),
    "batch size": (lambda s, x: s.rest(s.first(x) * [*range(len(x))][-1]), "another batch size"),
    "view": (writing_over_a_view, "values of their outputs differ. It writes over"),
    "checkpoint": (lambda s, x: checkpoint(s.rest, s.first(x), use_reentrant=False), "torch.fx cannot trace"),
    "unseeded": (lambda s, x: s.rest(s.first(x)) * torch.Generator().seed(), "different values when it runs twice"),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_leaves_no_trace(forward: Forward, reason: str) -> None:
    network = Parts(forward)
    before = dict(vars(network))
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(NetworkError, match=reason):
        cut(network, "first", images())
    assert all(vars(network)[name] is value for name, value in before.items() if name != "count")
    assert not any(isinstance(value, torch.fx.Proxy) for value in vars(network).values())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


def test_another_answer_of_the_shapes_is_refused_when_it_comes() -> None:
    network = Parts(even)
    head, tail = cut(network, "first", images(2, 8))
    assert torch.equal(tail(head(images(2, 10))), network(images(2, 10)))
    with pytest.raises(NetworkError, match="was False for the example it was cut on, but is True"):
        tail(head(images(2, 9)))


class Outputs(NamedTuple):
    logits: Tensor
    features: Tensor | None


@dataclass
class Fields:
    logits: Tensor
    count: int


OUTPUTS: dict[str, Forward] = {
    "named tuple": lambda s, x: Outputs(s.rest(s.first(x)), x.mean() if s.training else None),
    "dataclass": lambda s, x: Fields(s.rest(s.first(x)), len(x)),
    "dict": lambda s, x: {"logits": s.rest(s.first(x)), "size": x.shape[-2:]},
}


@pytest.mark.parametrize("forward", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_with_fields(forward: Forward) -> None:
    network = Parts(forward)
    head, tail = cut(network, "first", images())
    for training in (False, True):
        network.train(training)
        expected, found = network(images(4)), tail(head(images(4)))
        assert type(found) is type(expected)
        pairs = list(zip(tensors_in(expected), tensors_in(found), strict=True))
        assert len(pairs) == 1 + (training and "Outputs" in repr(expected))
        assert all(one == other and torch.equal(first, second) for (one, first), (other, second) in pairs)
        assert not isinstance(found, Fields) or found.count == 4


def test_a_call_of_several() -> None:
    network = Parts(lambda s, x: s.rest(s.first(x) + s.first(2 * x)))
    for stage in ("first[0]", "first[1]"):
        assert_equal(network, *cut(network, stage, images()), images(4))
    with pytest.raises(NetworkError, match="only 2 times"):
        cut(network, "first[2]", images())


def test_the_network_s_own_parameters_under_their_names() -> None:
    network = timm.create_model("resnet10t")
    head, tail = cut(network, "layer3", images(2, 32))
    own = dict(network.named_parameters())
    shared = {**dict(head.named_parameters()), **dict(tail.named_parameters())}
    assert len(shared) == len([*head.parameters(), *tail.parameters()]) == len(own)
    assert all(own[name] is parameter for name, parameter in shared.items())
    assert set(tail.state_dict()) == {name for name in network.state_dict() if name.startswith(("layer4.", "fc."))}
    assert tail.get_submodule("layer4") is network.layer4
    # A buffer of the network itself, after it moves to another type on either side.
    parts = Parts(FORWARDS["buffers"])
    head, tail = cut(parts, "first", images())
    tail.double()
    assert parts.scale is tail.scale
    assert parts.scale.dtype == torch.float64
    parts.float()
    assert torch.equal(tail(head(images())), parts(images()))
    assert parts.scale is tail.scale


def test_training_flags_are_the_network_s() -> None:
    network = timm.create_model("resnet10t")
    head, tail = cut(network.eval(), "layer3", images(2, 32))
    assert not network.training
    assert not any(module.training for module in (*network.modules(), *head.modules(), *tail.modules()))
    network.train()
    assert all(module.training for module in (*head.modules(), *tail.modules()))
    tail.eval()
    assert not any(module.training for module in (network, *tail.modules()))
    assert network.layer1.training


def test_attributes_that_change_after_the_cut() -> None:
    network = timm.create_model("test_vit", img_size=32, drop_rate=0.1)
    head, tail = cut(network, "blocks.0", images(2, 32))
    network.pos_drop.p = 0.5
    network.set_grad_checkpointing()
    assert_equal(network, head, tail, images(3, 32))
    network.set_grad_checkpointing(False)
    parts = Parts(FORWARDS["flag"])
    head, tail = cut(parts, "first", images())
    parts.drop_rate = 0.9
    assert_equal(parts, head, tail, images())
    for step in range(20):
        parts.drop_rate = step / 20
        assert tail(head(images())).shape == (3, 5)
    assert_equal(parts, head, tail, images())
    assert len(head._recordings.known) == MOST_KEPT
    parts.last = nn.Linear(4, 2)
    with pytest.raises(NetworkError, match="'last' of the network was replaced"):
        tail(head(images()))


@pytest.mark.slow
def test_the_tail_alone_on_what_a_hook_took() -> None:
    network = timm.create_model("xcit_nano_12_p16_224", drop_rate=0.2, drop_path_rate=0.2)
    head, tail = cut(network, "blocks.4", images(2, 32))
    assert isinstance(head(images(2, 32)), Crossing)
    taken: list[Tensor] = []
    network.blocks[4].register_forward_hook(lambda _module, _args, output: taken.append(output))
    network.eval()
    expected = network(images(5, 32))
    assert torch.equal(tail(taken[-1]), expected)
    assert torch.equal(tail(torch.zeros_like(taken[-1])), tail(head(images(5, 32))._replace(activation=0 * taken[-1])))
    network(images(2, 64))
    with pytest.raises(NetworkError, match="Give it all that the head returns"):
        tail(taken[-1])
    skip = Parts(FORWARDS["skip"])
    head, tail = cut(skip, "first", images())
    with pytest.raises(NetworkError, match="computes from the images crosses the cut"):
        tail(head(images()).activation)


def test_the_tail_leaves_its_activation_alone() -> None:
    network = Parts(FORWARDS["in place"]).eval()
    head, tail = cut(network, "first", images())
    activation = head(images())
    kept = activation.clone()
    assert torch.equal(tail(activation), tail(activation))
    assert torch.equal(activation, kept)


def test_position_embeddings_of_the_tail_get_their_gradient() -> None:
    network = Parts(lambda s, x: (s.position * 2, s.rest(s.first(x)))[1] + s.position.sum())
    head, tail = cut(network, "first", images())
    tail(head(images()).detach()).sum().backward()
    assert network.position.grad is not None
    assert network.first.weight.grad is None


@pytest.mark.slow
def test_wrappers_and_copies() -> None:
    network = timm.create_model("test_vit", img_size=32, drop_path_rate=0.2)
    compiled = torch.compile(network, backend="eager")
    head, tail = cut(compiled, "blocks.0", images(2, 32))
    assert_equal(network, head, tail, images(3, 32))
    wrapped = nn.DataParallel(network)
    assert_equal(network, *cut(wrapped, "blocks.0", images(2, 32)), images(3, 32))
    twin = copy.deepcopy(nn.Sequential(head, tail)).eval()
    assert torch.equal(twin(images(3, 32)), network.eval()(images(3, 32)))
    assert not set(twin.parameters()) & set(network.parameters())
    fast = torch.compile(tail, backend="eager", fullgraph=True)
    assert torch.equal(fast(head(images(3, 32))), network(images(3, 32)))


@pytest.mark.slow
def test_an_assistant_of_two_networks_in_data_parallel(tmp_path: Path) -> None:
    """Early stages of a student, a connector, the last stage of a frozen teacher in evaluation mode."""
    student = timm.create_model("resnet10t", num_classes=10, drop_path_rate=0.2)
    teacher = (
        timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.2).eval().requires_grad_(False)
    )
    head, _ = cut(student, "layer3", images(2, 32))
    _, tail = cut(teacher, "blocks.0", images(2, 32))
    connector = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(2), nn.Linear(4, teacher.embed_dim))
    tokens = head(images(2, 32)).shape[1]
    assert tail(torch.rand(2, tokens, teacher.embed_dim)).shape == (2, 10)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert isinstance(cut(DistributedDataParallel(student), "layer1", images(2, 32))[0], Head)
        assistant = DistributedDataParallel(nn.Sequential(head, connector, tail)).train()
        tail.eval()
        assistant(images(3, 32)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    assert student.layer3[0].conv1.weight.grad is not None
    assert connector[2].weight.grad is not None
    assert student.fc.weight.grad is None
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_network_comes_back_as_it_came() -> None:
    network = timm.create_model("resnet10t").eval()
    network.layer1.train()
    state = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    with torch.no_grad():
        cut(network, "layer2", images(2, 32))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert network.layer1.training
    assert not network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_stages_that_are_not_there() -> None:
    network = timm.create_model("resnet10t")
    with pytest.raises(SpecError, match=r"no 'layer9'. It has: conv1, .*layer4"):
        cut(network, "layer9", images(2, 32))
    with pytest.raises(SpecError, match="no ''"):
        cut(network, "", images(2, 32))
    with pytest.raises(NetworkError, match="2 example images or more, but got 1"):
        cut(network, "layer1", images(1, 32))
    with pytest.raises(NetworkError, match="TorchScript"):
        cut(torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), "0", torch.rand(2, 3))
