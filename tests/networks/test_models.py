"""Model specs mean what the contract says, and bad ones say what to do."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.errors import CheckpointError, SpecError
from cka_probe.images.preprocessing import Preprocessing, preprocessing_of
from cka_probe.networks import zoo
from cka_probe.networks.checkpoints import load_checkpoint, read_checkpoint
from cka_probe.networks.models import load_subject
from cka_probe.networks.specs import ModelSpec
from tests.hub import serving

TINY = "vit_tiny_patch16_224,img_size=32,patch_size=8,depth=2,embed_dim=48,num_heads=3"
FACTORIES = Path(__file__).parents[1] / "toy_networks.py"


def equal(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet18", ("resnet18", "resnet18", {}, None)),
        ("resnet18.a1_in1k", ("resnet18.a1_in1k", "resnet18.a1_in1k", {}, None)),
        ("hf-hub:org/name", ("hf-hub:org/name", "hf-hub:org/name", {}, None)),
        ("resnet18@random", ("resnet18@random", "resnet18", {}, "random")),
        ("resnet18@runs/x/student.safetensors", ("resnet18@student", "resnet18", {}, "runs/x/student.safetensors")),
        ("small=resnet18@random", ("small", "resnet18", {}, "random")),
        ("zoo:cnn-2", ("zoo:cnn-2", "zoo:cnn-2", {}, None)),
        ("models/net.py:build@best.pth", ("build@best", "models/net.py:build", {}, "best.pth")),
        ("x,img_size=32,patch_size=4@random", ("x@random", "x", {"img_size": 32, "patch_size": 4}, "random")),
        ("x,size=(8,16),name=abc,flag=true", ("x", "x", {"size": (8, 16), "name": "abc", "flag": True}, None)),
        ("my net=x,depth=2", ("my net", "x", {"depth": 2}, None)),
    ],
)
def test_a_spec_is_taken_apart(text: str, expected: tuple[object, ...]) -> None:
    spec = ModelSpec.parse(text)
    assert (spec.name, spec.base, dict(spec.options), spec.weights) == expected


@pytest.mark.parametrize("text", ["", "@random", "resnet18@", "resnet18,depth", "resnet18,=3", "resnet18,", "a=,x=2"])
def test_a_spec_that_is_none_says_so(text: str) -> None:
    with pytest.raises(SpecError, match="but got"):
        ModelSpec.parse(text)


def test_random_weights_are_seeded_and_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (load_subject(f"{TINY}@{weights}").network for weights in ("random", "random:0", "random:1"))
    assert equal(first, same)
    assert not equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(SpecError, match="must be followed by a seed"):
        load_subject(f"{TINY}@random:x")


def test_a_network_is_loaded_for_evaluation() -> None:
    assert not load_subject(f"{TINY}@random").network.training


@pytest.mark.parametrize(
    ("spec", "close"), [("resnet81", "resnet18"), ("deit_tinny_patch16_224", "deit_tiny_patch16_224")]
)
def test_an_unknown_model_names_close_ones(spec: str, close: str) -> None:
    with pytest.raises(SpecError, match=f"no model named '{spec}'.*{close}"):
        load_subject(spec)


def test_an_unknown_tag_names_those_there_are() -> None:
    with pytest.raises(SpecError, match=r"no weights 'nope' for 'resnet18'\. It has: .*resnet18\.a1_in1k"):
        load_subject("resnet18.nope")


def test_a_model_without_pretrained_weights_says_so() -> None:
    with pytest.raises(SpecError, match="no pretrained weights for 'botnet50ts_256'. Use botnet50ts_256@random"):
        load_subject("botnet50ts_256")


def test_arguments_that_the_model_does_not_take_are_told() -> None:
    with pytest.raises(SpecError, match="resnet18.*with no_such=1"):
        load_subject("resnet18,no_such=1@random")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".th", ".bin"])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema", "network"])
def test_a_checkpoint_fits_however_it_was_wrapped(tmp_path: Path, suffix: str, key: str | None) -> None:
    if suffix == ".safetensors" and key:
        return  # safetensors has no nesting
    trained = timm.create_model("resnet18", num_classes=7)
    state = {f"module.{name}": value for name, value in trained.state_dict().items()}
    path = tmp_path / f"student{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=1)} if key else state, path)
    subject = load_subject(f"resnet18@{path}")
    assert subject.name == "resnet18@student"
    assert equal(subject.network, trained), "with the number of classes read from it"
    assert "sha256" in subject.source["weights"]


@pytest.mark.parametrize("rest", [{}, {"criterion.weight": torch.ones(3)}])
def test_weights_under_a_prefix_are_found_as_in_lightnings_checkpoints(
    tmp_path: Path, rest: dict[str, torch.Tensor]
) -> None:
    trained = timm.create_model("resnet10t", num_classes=7)
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state | rest, "epoch": 1, "loops": {"fit": {}}}, tmp_path / "last.ckpt")
    assert equal(load_subject(f"resnet10t@{tmp_path / 'last.ckpt'}").network, trained)
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 5))
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, num_classes))\n"
    )
    torch.save({f"net.backbone.{name}": value for name, value in own.state_dict().items()} | rest, tmp_path / "own.pt")
    assert equal(load_subject(f"{tmp_path / 'mine.py'}:make@{tmp_path / 'own.pt'}").network, own)


def test_two_networks_under_prefixes_are_refused(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    state = {
        f"{prefix}.{name}": value for prefix in ("model", "teacher") for name, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"holds several, under the prefixes 'model\.', 'teacher\.'"):
        load_checkpoint(network, tmp_path / "two.pt")


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    plain, averaged = nn.Linear(2, 2).state_dict(), nn.Linear(2, 2).state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "both.pth")
    assert torch.equal(read_checkpoint(tmp_path / "both.pth")["weight"], averaged["weight"])


def test_a_headless_checkpoint_makes_a_headless_network(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "backbone.safetensors")
    network = load_subject(f"resnet18@{tmp_path / 'backbone.safetensors'}").network
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 512)


@pytest.mark.slow
def test_weights_in_the_original_authors_format_are_converted(tmp_path: Path) -> None:
    trained = timm.create_model("swin_tiny_patch4_window7_224")
    original = {name.replace("head.fc.", "head."): value for name, value in trained.state_dict().items()}
    original = {
        f"layers.{int(name[7]) - 1}{name[8:]}" if ".downsample." in name else name: value
        for name, value in original.items()
    }
    torch.save({"model": original}, tmp_path / "swin.pth")
    assert equal(load_subject(f"swin_tiny_patch4_window7_224@{tmp_path / 'swin.pth'}").network, trained)


def test_a_checkpoint_that_does_not_fit_names_the_keys(tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    state["extra"] = state.pop("layer4.1.bn2.weight")
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="does not fit ResNet") as caught:
        load_subject(f"resnet18@{tmp_path / 'odd.pth'}")
    for part in ("layer4.1.bn2.weight", "extra", r"conv1.weight (64, 1, 7, 7) for (64, 3, 7, 7)"):
        assert part in str(caught.value)


def test_a_checkpoint_that_needs_unpickling_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    with pytest.raises(CheckpointError, match=r"needs arbitrary unpickling.*state_dict\(\) alone"):
        load_subject(f"resnet18@{tmp_path / 'pickled.pth'}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.pth", b"\x80garbage", "cannot be read"),
        ("broken.safetensors", b"garbage!", "cannot be read"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("missing.pth", None, "must be a file, but there is none"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_says_why(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_subject(f"resnet18@{tmp_path / name}")


def test_a_checkpoint_without_tensors_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "log.pth")
    with pytest.raises(CheckpointError, match="state dict of tensors, but holds: epoch, loss"):
        load_subject(f"resnet18@{tmp_path / 'log.pth'}")


def test_a_factory_of_the_user_s_own_makes_a_network_with_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(5)
    from tests.toy_networks import small_cnn

    trained = small_cnn(width=6)
    torch.save(trained.state_dict(), tmp_path / "best.pth")
    subject = load_subject(f"{FACTORIES}:small_cnn,width=6@{tmp_path / 'best.pth'}")
    assert subject.name == "small_cnn@best"
    assert equal(subject.network, trained)
    assert equal(load_subject(f"{FACTORIES}:small_cnn").network, load_subject(f"{FACTORIES}:small_cnn@random").network)


def test_a_factory_in_a_package_may_import_its_siblings(tmp_path: Path) -> None:
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("from torch import nn\nhead = nn.Linear(3, 2)\n")
    (package / "net.py").write_text("from .parts import head\ndef build():\n    return head\n")
    assert isinstance(load_subject(f"{package / 'net.py'}:build").network, nn.Linear)


@pytest.mark.parametrize(
    ("source", "factory", "message"),
    [
        ("def build(): return 3", "build", "must return a torch.nn.Module, but returned int"),
        ("def build(): return 3", "biuld", "must define 'biuld', but does not. Close names: build"),
        ("import no_such_package", "build", "could not be imported: ModuleNotFoundError"),
        ("def build(depth): return 3", "build", "could not be called with no arguments"),
    ],
)
def test_a_factory_that_does_not_work_says_why(tmp_path: Path, source: str, factory: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(SpecError, match=message):
        load_subject(f"{tmp_path / 'mine.py'}:{factory}")


def test_an_error_inside_a_factory_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build():\n    return len(3)")
    before = list(sys.path)
    with pytest.raises(SpecError, match=r"raised TypeError: object of type 'int' has no len.*mine\.py, line 2"):
        load_subject(f"{tmp_path / 'mine.py'}:build")
    assert sys.path == before


def test_a_factory_file_that_is_not_there_says_so() -> None:
    with pytest.raises(SpecError, match=r"nowhere\.py does not"):
        load_subject("nowhere.py:build")


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_zoo_reads_the_held_out_digits(name: str) -> None:
    assert evaluate(f"zoo:{name}", data="digits", device="cpu").top1 > 0.98
    assert zoo.weights_path(name).stat().st_size < 1_000_000


def test_the_zoo_s_seeds_differ_and_random_is_untrained() -> None:
    trained, second, random = (load_subject(f"zoo:{name}").network for name in ("vit", "vit-2", "vit@random"))
    assert not equal(trained, second)
    assert not equal(trained, random)
    with pytest.raises(SpecError, match="The zoo holds zoo:cnn, zoo:cnn-2"):
        load_subject("zoo:rnn")


def test_preprocessing_comes_from_the_model_and_its_arguments() -> None:
    deit = load_subject("deit_tiny_patch16_224,img_size=32,patch_size=4@random")
    assert deit.preprocessing == Preprocessing(
        (3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "center"
    )
    assert load_subject("resnet18,in_chans=1@random").preprocessing.size == (1, 224, 224)
    assert preprocessing_of(nn.Linear(2, 2)) == Preprocessing()


@pytest.mark.full
def test_an_unreachable_hub_is_told_at_once_and_names_the_ways_out(tmp_path: Path) -> None:
    finished = run_with_hub("http://127.0.0.1:9", tmp_path, "load_subject('resnet18')")
    assert "HubError" in finished.stderr
    assert "resnet18@random" in finished.stderr
    assert "resnet18@CHECKPOINT" in finished.stderr
    assert "Retrying" not in finished.stderr


@pytest.mark.full
def test_pretrained_weights_load_from_the_hub_and_then_from_its_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "timm" / "resnet18.a1_in1k"
    repository.mkdir(parents=True)
    trained = timm.create_model("resnet18")
    save_file(trained.state_dict(), repository / "model.safetensors")
    save_file(trained.state_dict(), tmp_path / "same.safetensors")
    program = (
        "subject = load_subject('resnet18'); other = load_subject(f'resnet18@{sys.argv[1]}').network.state_dict();"
        "print(subject.source['weights'], all((subject.network.state_dict()[k] == other[k]).all() for k in other))"
    )
    with serving(tmp_path / "hub") as address:
        fetched = run_with_hub(address, tmp_path / "cache", program, str(tmp_path / "same.safetensors"))
    assert fetched.stdout.split() == ["resnet18.a1_in1k", "True"], fetched.stderr
    cached = run_with_hub("http://127.0.0.1:9", tmp_path / "cache", program, str(tmp_path / "same.safetensors"))
    assert cached.stdout.split() == ["resnet18.a1_in1k", "True"], cached.stderr


@pytest.mark.full
def test_a_pretrained_network_with_a_random_classifier_is_refused(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "timm" / "resnet18.a1_in1k"
    repository.mkdir(parents=True)
    save_file(timm.create_model("resnet18").state_dict(), repository / "model.safetensors")
    program = "load_subject('resnet18,num_classes=0'); print('loaded'); load_subject('resnet18,num_classes=10')"
    with serving(tmp_path / "hub") as address:
        finished = run_with_hub(address, tmp_path / "cache", program)
    assert finished.stdout == "loaded\n"
    assert "with num_classes=10 its classifier would be random" in finished.stderr


@pytest.mark.full
@pytest.mark.parametrize("weights", ["random", "weights.safetensors"])
def test_an_architecture_on_an_unreachable_hub_is_told_too(tmp_path: Path, weights: str) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "weights.safetensors")
    spec = f"hf-hub:some/net@{weights if weights == 'random' else tmp_path / weights}"
    finished = run_with_hub("http://127.0.0.1:9", tmp_path, f"load_subject({spec!r})")
    assert "HubError: The model 'hf-hub:some/net' could not be fetched" in finished.stderr


def run_with_hub(address: str, cache: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the Hub's client reads its address and cache when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    program = f"import sys; from cka_probe.networks.models import load_subject; {program}"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
