"""What a network does is seen by no other, and what it raises is told with its name and the batch."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.activations.forward import eagerly, keeping_buffers, run_network
from cka_probe.activations.modules import module_at, modules_of, second_paths, unwrapped
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.errors import DataError, NetworkError, OutOfMemoryError, SpecError
from cka_probe.networks.models import Subject, load_subject
from cka_probe.probing.compare import list_layers
from cka_probe.runtime.user_code import current_modes

MEASURES = ("cka", "cka-rbf", "procrustes", "mutual-knn")
Forward = Callable[["Probed", Tensor], Any]


class Probed(nn.Module):
    """A network of three layers, its forward pass that of ``body``."""

    def __init__(self, body: Forward | None = None) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Linear(6, 10)
        self.register_buffer("state", torch.zeros(()))
        self.body, self.passes = body, 0
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x: Tensor) -> Any:
        self.passes += 1
        return self.body(self, x) if self.body is not None else self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.act(self.conv(x)).mean((2, 3)))
        return logits


def images(count: int = 48) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def compare(models: dict[str, nn.Module], **options: Any) -> dict[str, cp.Similarity]:
    asked: dict[str, Any] = {"data": images(), "layers": "all", "batch_size": 16, "measures": MEASURES, "device": "cpu"}
    return cp.compare(models, **{**asked, **options})  # type: ignore[no-any-return]


def in_place(net: Probed, x: Tensor) -> Tensor:
    return net.plain(x.sub_(0.4).div_(0.2))


def by_data(net: Probed, x: Tensor) -> Tensor:
    x.data.mul_(-1)
    return net.plain(x)


def into_slices(net: Probed, x: Tensor) -> Tensor:
    x[:, :, :5] = 0
    return net.plain(x)


def with_dropout(net: Probed, x: Tensor) -> Tensor:
    return net.plain(nn.functional.dropout(x, 0.5, training=True))


def with_other_noise(net: Probed, x: Tensor) -> Tensor:
    return net.plain(x * (random.random() + np.random.rand()))


def seeding(net: Probed, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return net.plain(x)


def changing_modes(net: Probed, x: Tensor) -> Tensor:
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_autocast_enabled("cpu", True)
    torch.set_float32_matmul_precision("medium")
    with torch.inference_mode():
        return net.plain(x)


def counting(net: Probed, x: Tensor) -> Tensor:
    net.state += 1
    return net.plain(x + net.state)


def counting_anew(net: Probed, x: Tensor) -> Tensor:
    net.state = net.state + x.mean()
    return net.plain(x + net.state)


def counting_by_data(net: Probed, x: Tensor) -> Tensor:
    net.state.data.add_(x.mean())
    return net.plain(x + net.state)


HARMFUL = [
    in_place, by_data, into_slices, with_dropout, with_other_noise, seeding, changing_modes, counting, counting_anew,
    counting_by_data,
]  # fmt: skip


def global_state() -> list[Any]:
    modes = [torch.is_grad_enabled(), torch.get_default_dtype(), current_modes()[2], torch.get_num_threads()]
    modes += [torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()]
    return [*modes, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def assert_pair_is_same(one: dict[str, cp.Similarity], other: dict[str, cp.Similarity], net: str) -> None:
    for name in MEASURES:
        for part in ("values", "std_error", "null"):
            first, second = (getattr(found[name].between("plain", net), part) for found in (one, other))
            np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def all_together() -> dict[str, cp.Similarity]:
    """All harmful networks and a plain one between them, compared at once."""
    first, second = ({f"{body.__name__}{end}": Probed(body) for body in HARMFUL} for end in (" before", ""))
    networks = {**first, "plain": Probed(), **second}
    before = global_state()
    found = compare(networks)
    assert global_state() == before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("body", HARMFUL)
def test_a_pair_of_networks_is_the_same_whatever_is_compared_beside_it(
    body: Forward, all_together: dict[str, cp.Similarity]
) -> None:
    name = body.__name__
    pair = compare({"plain": Probed(), name: Probed(body)})
    assert_pair_is_same(pair, all_together, name)
    assert_pair_is_same(pair, compare({"plain": Probed(), name: Probed(body)}, memory="100GB"), name)


@pytest.mark.slow
@pytest.mark.parametrize("body", [in_place, by_data, into_slices, seeding])
def test_what_leaves_its_values_alone_has_the_values_of_the_plain_network(body: Forward) -> None:
    prepared: dict[Forward, Callable[[Tensor], Tensor]] = {
        in_place: lambda x: (x - 0.4) / 0.2, by_data: lambda x: -x,
        into_slices: lambda x: torch.cat([torch.zeros_like(x[:, :, :5]), x[:, :, 5:]], 2),
    }  # fmt: skip
    change = prepared.get(body, lambda x: x)
    expected = compare({"net": Probed(lambda net, x: net.plain(change(x)))})["cka"]
    np.testing.assert_allclose(compare({"net": Probed(body)})["cka"].values, expected.values, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("body", [counting, counting_anew, counting_by_data, with_dropout])
def test_a_view_does_not_see_what_another_view_of_the_network_did(body: Forward) -> None:
    asked: dict[str, Any] = {"image_size": 12, "layers": "all", "examples": 48, "batch_size": 16, "device": "cpu"}
    two = cp.compare({"net": Probed(body)}, views="identity,gray", **asked)
    three = cp.compare({"net": Probed(body)}, views="blur:1,identity,gray", **asked)
    names = "net [identity]", "net [gray]"
    np.testing.assert_array_equal(three.between(*names).values, two.between(*names).values)


def test_a_random_view_does_not_depend_on_the_views_and_networks_beside_it() -> None:
    def noisy(image: Any) -> Any:
        return image.point(lambda value: value // 2 + random.randrange(64))

    asked: dict[str, Any] = {"image_size": 12, "layers": "all", "examples": 32, "batch_size": 16, "device": "cpu"}
    alone = cp.compare({"net": Probed()}, views=["identity", noisy], **asked)
    beside = cp.compare({"b": "zoo:cnn", "net": Probed()}, views=[noisy, "identity"], workers=1, **asked)
    names = "net [identity]", "net [noisy]"
    np.testing.assert_array_equal(beside.between(*names).values, alone.between(*names).values)


def test_a_run_that_goes_on_draws_the_numbers_of_the_batch(tmp_path: Path) -> None:
    def drawing(net: Probed, x: Tensor) -> Tensor:
        return counting(net, nn.functional.dropout(x, 0.5, training=True))

    def failing(net: Probed, x: Tensor) -> Tensor:
        if net.passes == 5:  # two passes are the dry run
            raise ValueError("later")
        return drawing(net, x)

    whole = compare({"net": Probed(drawing)})
    kept: dict[str, Any] = {"checkpoint": tmp_path / "kept", "checkpoint_minutes": 60}
    with pytest.raises(NetworkError, match=r"'net' .* in batch 3 of 3 it raised ValueError: later"):
        compare({"net": Probed(failing)}, **kept)
    batches: list[int] = []
    resumed = compare({"net": Probed(drawing)}, resume=True, progress=lambda done, _: batches.append(done), **kept)
    assert batches == [48], "the first two batches are kept"
    for name in MEASURES:
        np.testing.assert_array_equal(resumed[name].values, whole[name].values)


def test_a_network_that_changes_its_weights_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def growing(net: Probed, x: Tensor) -> Tensor:
        net.fc.weight.data.mul_(1.01)
        return net.plain(x)

    with caplog.at_level(logging.WARNING, "cka_probe"):
        compare({"net": Probed(growing)})
    assert "'net' changes its own weights while it runs (fc.weight)" in caplog.text


@pytest.mark.slow
def test_a_buffer_that_has_grown_stays_and_one_that_cannot_be_written_is_left_alone() -> None:
    network = Probed(lambda net, x: x)
    network.register_buffer("cache", torch.zeros(2))
    network.register_buffer("shown", torch.zeros(1).expand(3))
    network.body = lambda net, x: setattr(net, "cache", torch.ones(5)) or counting(net, x)
    with keeping_buffers(network), torch.no_grad():
        run_network(network, images(4), "it")
    assert network.cache.shape == (5,)
    assert network.state == 0


def test_lazy_modules_take_shape_in_the_dry_run() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))

    first = compare({"net": lazy()})["cka"].values
    torch.manual_seed(7)
    np.testing.assert_array_equal(compare({"net": lazy()})["cka"].values, first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_floating_type_run(kind: torch.dtype, tmp_path: Path) -> None:
    expected = compare({"net": Probed()}, measures=("cka", "rsa"))
    found = compare({"net": Probed().to(kind)}, measures=("cka", "rsa"))
    for name, similarity in expected.items():
        np.testing.assert_allclose(found[name].values, similarity.values, atol=1e-4 if kind == torch.float64 else 0.05)
    assert cp.extract({"net": Probed().to(kind)}, tmp_path / "out", data=images(), layers="all", device="cpu")
    imports = "from tests.activations.test_forward import *\n"
    (tmp_path / "net.py").write_text(f"{imports}def net(): return Probed().to({kind})\n")
    (tmp_path / "plain.py").write_text(f"{imports}def net(): return Probed()\n")
    accuracies = [evaluate(f"{tmp_path}/{name}.py:net", image_size=16, device="cpu") for name in ("net", "plain")]
    assert accuracies[0].top1 == pytest.approx(accuracies[1].top1, abs=0.05)


# Compiled networks


@pytest.fixture
def compiled() -> Iterator[Callable[[Any], Any]]:
    torch._dynamo.reset()
    yield lambda network: torch.compile(network, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_networks_have_the_values_and_names_of_plain_ones(compiled: Callable[[Any], Any]) -> None:
    expected = compare({"net": Probed()})["cka"]
    whole, part, called, inside = Probed(), Probed(), Probed(), Probed()
    part.conv = compiled(part.conv)
    called.compile(backend="aot_eager")
    inside.forward = compiled(inside.forward)  # type: ignore[method-assign]
    wrapped = compiled(whole)
    for network in (wrapped, part, called, inside, nn.DataParallel(Probed())):
        if not isinstance(network, nn.DataParallel):
            network(images(16))  # what ran compiled before is not looked into by new hooks
        found = compare({"net": network})["cka"]
        assert found.rows == expected.rows
        np.testing.assert_array_equal(found.values, expected.values)
    assert type(part.conv).__name__ == "OptimizedModule"
    assert called._compiled_call_impl is not None
    assert [layer.name for layer in list_layers(wrapped, layers="all", image_size=10)] == ["conv", "act", "fc"]


def test_within_the_block_nothing_is_compiled(compiled: Callable[[Any], Any]) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with eagerly():
        double(torch.ones(2))
    assert not graphs
    double(torch.ones(2))
    assert len(graphs) == 1


def test_wrappers_are_looked_through_by_path(compiled: Callable[[Any], Any]) -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    network = nn.Sequential(compiled(inner), inner[1], nn.DataParallel(nn.Linear(2, 2)))
    assert list(modules_of(network)) == ["", "0", "0.0", "0.1", "2"]
    assert second_paths(network) == {"1": "0.1"}
    assert module_at(network, "0.1") is inner[1]
    assert unwrapped(nn.DataParallel(compiled(network))) is network
    assert Subject("net", compiled(network)).network is network
    with pytest.raises(AttributeError):
        module_at(network, "0.7")


# What is raised


class SilentError(Exception):
    def __str__(self) -> str:
        raise ValueError("not even that")


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        ValueError("later"),
        SystemExit(7),
        StopIteration(),
        GeneratorExit(),
        BaseException("b"),
        SilentError(),
        KeyError("k"),
    ],
)
@pytest.mark.parametrize(
    ("at", "said"),
    [
        (1, r"'net' cannot be run. It must run on images of shape \(3, 10, 10\), but raised {}"),
        (3, "'net' must run on every batch, but in batch 1 of 3 it raised {}"),
        (5, "'net' must run on every batch, but in batch 3 of 3 it raised {}"),
    ],
)
def test_whatever_is_raised_names_network_and_batch(error: BaseException, at: int, said: str, tmp_path: Path) -> None:
    def failing(net: Probed, x: Tensor) -> Tensor:
        if net.passes == at:
            raise error
        return net.plain(x)

    with pytest.raises(NetworkError, match=said.format(type(error).__name__)):
        compare({"net": Probed(failing)})
    with pytest.raises(NetworkError, match=said.format(type(error).__name__)):
        cp.extract({"net": Probed(failing)}, tmp_path / "out", data=images(), layers="all", batch_size=16)


def test_an_interrupt_and_a_lack_of_memory_stay_what_they_are() -> None:
    def failing(error: BaseException) -> Probed:
        def body(net: Probed, x: Tensor) -> Tensor:
            raise error

        return Probed(body)

    with pytest.raises(KeyboardInterrupt):
        compare({"net": failing(KeyboardInterrupt())})
    with pytest.raises(OutOfMemoryError, match="Out of memory in the forward pass of 'net'"):
        compare({"net": failing(torch.OutOfMemoryError("CUDA out of memory"))})


@pytest.mark.parametrize("method", ["eval", "to", "named_modules", "parameters", "state_dict"])
def test_a_network_whose_own_methods_raise_is_named(method: str, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("mine")

    network = Probed()
    setattr(network, method, broken)
    with pytest.raises(NetworkError, match=r"'net' .* raised ValueError: mine \(test_forward.py, line"):
        compare({"net": network}, checkpoint=tmp_path / "kept", checkpoint_minutes=0)
    assert not any(module._forward_hooks for module in network.children())


def test_half_the_rows_on_a_later_batch_are_named() -> None:
    with pytest.raises(NetworkError, match="'conv' of 'net' .* each of the 16 images, but put out 8 in batch 2 of 3"):
        compare({"net": Probed(lambda net, x: net.plain(x[: len(x) // 2] if net.passes == 4 else x))})
    with pytest.raises(SpecError, match="No layer of 'net' .* does not have the examples along one axis"):
        compare({"net": Probed(lambda net, x: net.plain(x[: len(x) // 2]))})


def test_a_layer_that_is_called_more_often_later_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def often(net: Probed, x: Tensor) -> Tensor:
        return net.plain(x) if net.passes < 4 else net.act(net.plain(x))

    with caplog.at_level(logging.WARNING, "cka_probe"):
        compare({"net": Probed(often)})
    assert caplog.text.count("more often") == 1
    assert "net calls the layer act more often in batch 2 of 3 than in the dry run" in caplog.text


def test_a_second_name_of_a_module_leads_to_the_first() -> None:
    network = Probed()
    network.twin = network.conv
    with pytest.raises(SpecError, match="matches 'twin' can be compared: the same module as 'conv'"):
        compare({"net": network}, layers="twin")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), "TorchScript module, whose layers cannot"),
        (lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)).eval())), "TorchScript module"),
        (lambda: torch.export.export(nn.Conv2d(3, 4, 3), (images(2),)).module(), "'net' is an exported program"),
        (lambda: Probed().to("meta"), "'net' is on the device 'meta', where it has no weights"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_that_cannot_be_looked_into_gets_advice_that_fits(network: Callable[[], Any], said: str) -> None:
    with pytest.raises(NetworkError, match=said) as caught:
        compare({"net": network()})
    assert "--image-size" not in str(caught.value)


def test_the_size_is_named_only_where_it_may_be_wrong() -> None:
    with pytest.raises(NetworkError) as caught:
        list_layers("vit_tiny_patch16_224@random", image_size=32)
    assert str(caught.value) == (
        "'vit_tiny_patch16_224@random' takes 224 × 224 images, but these are 32 × 32. Drop --image-size, or build it "
        "for these: vit_tiny_patch16_224,img_size=32@random."
    ) or "'vit_tiny_patch16_224' takes 224 × 224 images" in str(caught.value)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(NetworkError, match="If it takes images of another size, give that size with --image-size"):
        compare({"net": flat})
    with pytest.raises(NetworkError, match="It takes 1 channels, but the images have 3"):
        compare({"net": nn.Sequential(nn.Conv2d(1, 2, 3))})
    with pytest.raises(NetworkError) as caught:
        compare({"net": Probed(lambda net, x: net.nothing(x))})
    assert "--image-size" not in str(caught.value)


# A user's own files

FILE = """
import os, random, sys
import numpy as np
import torch
from torch import nn
torch.set_default_dtype(torch.float64)
random.seed(1)
def exits(): sys.exit(7)
def draws():
    torch.set_grad_enabled(False)
    os.chdir("/")
    net = nn.Linear(2, 2)
    net.weight.data.fill_(np.random.rand())
    return net
def no_eval():
    net = nn.Linear(2, 2)
    def broken(): raise ValueError("mine")
    net.eval = broken
    return net
def view(image): sys.exit(3)
"""


def test_a_factory_leaves_nothing_behind_and_its_numpy_numbers_are_seeded(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    before, folder = global_state(), Path.cwd()
    first, again = (load_subject(f"{tmp_path}/mine.py:draws") for _ in range(2))
    assert global_state() == before
    assert Path.cwd() == folder
    assert torch.equal(first.network.weight, again.network.weight)
    with pytest.raises(SpecError, match=r"mine.py:exits must return a network, but raised SystemExit: 7 \(mine.py"):
        load_subject(f"{tmp_path}/mine.py:exits")
    with pytest.raises(NetworkError, match=r"'no_eval' must have an evaluation mode, but its eval\(\) raised"):
        load_subject(f"{tmp_path}/mine.py:no_eval")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_view_that_exits_is_named(workers: int, tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    asked: dict[str, Any] = {"data": image_folder, "image_size": 12, "batch_size": 4, "workers": workers}
    with pytest.raises(DataError, match="The view 'view' could not be applied: SystemExit: 3"):
        cp.compare({"net": Probed()}, views=f"identity,{tmp_path}/mine.py:view", layers="all", **asked)


def test_a_worker_that_is_lost_is_told(image_folder: Path) -> None:
    import os

    def gone(image: Any) -> Any:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            os._exit(3)
        return image

    asked: dict[str, Any] = {"data": image_folder, "image_size": 12, "batch_size": 4, "workers": 1}
    with pytest.raises(DataError, match="A worker process that loads images ended unexpectedly"):
        cp.compare({"net": Probed()}, views=["identity", gone], layers="all", **asked)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    source = (
        "from tests.activations.test_forward import Probed\ndef net(): return Probed()\ndef view(image): return image\n"
    )
    asked: dict[str, Any] = {
        "examples": 32, "batch_size": 16, "image_size": 12, "layers": "all", "checkpoint": tmp_path / "kept",
        "checkpoint_minutes": 0, "views": f"identity,{file}:view", "resume": True,
    }  # fmt: skip
    file.write_text(source)
    cp.compare([f"{file}:net"], **asked)
    cp.compare([f"{file}:net"], **asked)
    file.write_text(f"{source}# changed\n")
    with pytest.raises(SpecError, match=r"code of net \[identity\] was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        cp.compare([f"{file}:net"], **asked)
    with pytest.raises(SpecError, match=r"view of Probed \[view\] was"):
        cp.compare([Probed()], **{**asked, "checkpoint": _begun(file, source, tmp_path, asked)})


def _begun(file: Path, source: str, tmp_path: Path, asked: dict[str, Any]) -> Path:
    """A run of a network of no file, whose view was that of another file."""
    kept = tmp_path / "other"
    file.write_text(source)
    cp.compare([Probed()], **{**asked, "checkpoint": kept})
    file.write_text(f"{source}# changed\n")
    return kept


# Evaluation


def evaluated(body: str, tmp_path: Path) -> Any:
    (tmp_path / "net.py").write_text(
        f"from tests.activations.test_forward import *\ndef net(): return Probed({body})\n"
    )
    return evaluate(f"{tmp_path}/net.py:net", batch_size=60, image_size=16, device="cpu", workers=0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("lambda n, x: n.plain(x) if n.passes < 4 else 1 / 0", "'net' .* in batch 3 of 6 it raised ZeroDivisionError"),
        ("lambda n, x: n.plain(x) if n.passes < 4 else exit(2)", "'net' .* in batch 3 of 6 it raised SystemExit"),
        ("lambda n, x: n.plain(x[: 30 if n.passes == 4 else None])", r"for 60 images, but in batch 3 of 6 put out"),
        ("lambda n, x: n.plain(x) * (1 if n.passes < 7 else np.nan)", "of 59 of the 359 images hold NaN"),
        ('lambda n, x: {"out": n.plain(x)}', "'net' must put out logits .*"),
    ],
)
def test_evaluation_names_network_and_batch(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=said):
        evaluated(body, tmp_path)


@pytest.mark.slow
def test_evaluation_is_that_of_the_network_and_of_nothing_that_it_did_before(tmp_path: Path) -> None:
    plain = evaluated("", tmp_path)
    assert evaluated("changing_modes", tmp_path) == plain
    assert evaluated("lambda n, x: n.plain(x.clone()) + 0 * x.mul_(-1).sum()", tmp_path) == plain
    assert evaluated("with_dropout", tmp_path) == evaluated("with_dropout", tmp_path)
