"""compare() gives the numbers of the paper's formulas, for any number of subjects, in one pass."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.errors import FeatureError, NetworkError, OutOfMemoryError, OutputError, SpecError
from cka_probe.results.cautions import cautions
from tests import oracles
from tests.measures_at_work import start
from tests.toy_networks import Constant, Reused, Windows


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def in_order(data: Tensor, seed: int = 0) -> Tensor:
    """The tensor in the order in which compare() takes it."""
    return data[np.random.default_rng(seed).permutation(len(data))]


def expected(batches: list[list[np.ndarray]]) -> np.ndarray:
    """CKA of all pairs of layers, from the float64 features of each layer in each batch, by the oracle."""
    grams = [[oracles.linear_gram(layer) for layer in batch] for batch in batches]
    layers = list(zip(*grams, strict=True))
    return np.array([[oracles.minibatch_cka(k, l, debiased=True) for l in layers] for k in layers])


@pytest.fixture(scope="module")
def joint() -> cp.Similarity:
    return cp.compare(["zoo:cnn", "zoo:vit", "zoo:mlp"], examples=96, batch_size=32)


def test_the_joint_matrix_is_symmetric_with_ones_on_its_diagonal(joint: cp.Similarity) -> None:
    assert joint.models == ("zoo:cnn", "zoo:vit", "zoo:mlp")
    assert joint.values.shape == (24, 24)
    np.testing.assert_allclose(np.diag(joint.values), 1, atol=1e-12)
    np.testing.assert_allclose(joint.values, joint.values.T, atol=1e-12)
    assert np.abs(joint.values).max() <= 1 + 1e-12


def test_a_pair_is_that_block_of_the_joint_matrix(joint: cp.Similarity) -> None:
    pair = cp.compare(["zoo:vit", "zoo:mlp"], examples=96, batch_size=32)
    np.testing.assert_allclose(
        pair.between("zoo:vit", "zoo:mlp").values, joint.between("zoo:vit", "zoo:mlp").values, atol=1e-12
    )


def test_values_are_the_ratio_of_sums_over_batches_of_the_activations() -> None:
    network, data = Reused(), images(22)
    similarity = cp.compare({"net": network}, data=data, layers="all", batch_size=8)
    batches = []
    with torch.no_grad():
        for part in in_order(data).split(8):  # 8, 8 and a ragged 6
            first = network.first(part)
            middle = network.second(first.relu())
            batches.append([x.flatten(1).double().numpy() for x in (first, first.relu(), middle, middle.relu())])
    assert [layer.name for layer in similarity.rows] == ["first", "act[0]", "second", "act[1]"]
    np.testing.assert_allclose(similarity.values, expected(batches), atol=1e-6)  # float32 convolutions


def test_one_batch_equals_the_function_and_has_no_standard_error(caplog: pytest.LogCaptureFixture) -> None:
    data = images(20)
    with caplog.at_level("INFO", "cka_probe"):
        similarity = cp.compare({"net": Windows()}, data=data, layers="all", batch_size=20)
    flat = data.flatten(1)
    assert cp.linear_cka(flat, flat) == pytest.approx(1)
    assert np.isnan(similarity.std_error).all()
    assert "no standard errors" in caplog.text
    np.testing.assert_allclose(similarity.values, 1, atol=1e-6)  # three layouts of the same pixels


@pytest.mark.parametrize("debiased", [True, False])
def test_two_measures_come_from_one_pass(debiased: bool) -> None:
    network, data = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU()), images(16)
    linear, rbf = specs = ["cka", "cka-rbf"] if debiased else ["cka:biased", "cka-rbf:biased"]
    both = cp.compare({"net": network}, data=data, layers="all", measures=specs)
    assert list(both) == specs
    with torch.no_grad():
        x, y = data.flatten(1), network(data)
    assert both[linear].values[0, 2] == pytest.approx(cp.linear_cka(x, y, debiased=debiased), abs=1e-6)
    assert both[rbf].values[0, 2] == pytest.approx(cp.rbf_cka(x, y, debiased=debiased), abs=1e-6)
    assert both[rbf].provenance.others["median"] == "off-diagonal"


def test_offset_features_keep_their_digits() -> None:
    class Offset(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + 1000

    network, data = nn.Sequential(Offset(), nn.Linear(192, 20)), images(32)
    similarity = cp.compare({"net": network}, data=data, layers="all", batch_size=16, device="cpu")
    batches = []
    with torch.no_grad():
        for part in in_order(data).split(16):
            x = part.flatten(1) + 1000
            batches.append([x.double().numpy(), network[1](x).double().numpy()])
    # The network itself rounds to float32 around 1000; the Gram matrices of what it put out must not.
    np.testing.assert_allclose(similarity.values, expected(batches), atol=1e-6)


def test_a_constant_layer_is_nan_in_its_own_row_and_column_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    similarity = cp.compare({"net": Constant()}, data=images(12), layers="all", batch_size=6)
    undefined = np.isnan(similarity.values)
    assert undefined[0].all()
    assert undefined[:, 0].all()
    assert not undefined[1:, 1:].any()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "net constant" in warnings[0]


def test_a_layer_that_is_not_finite_is_named_with_its_model() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, torch.inf)

    with pytest.raises(FeatureError, match=r"layer '1' of 'net' hold NaN or infinity"):
        cp.compare({"net": nn.Sequential(nn.Flatten(), Broken())}, data=images(8), layers="all")


@pytest.mark.slow
def test_networks_are_given_back_as_they_came() -> None:
    network = timm.create_model("resnet18").train()
    network.layer1.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    cp.compare({"net": network}, data=images(8, 32), layers="stages")
    assert network.training
    assert network.layer2.training
    assert not network.layer1.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_networks_are_given_back_when_the_comparison_fails() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).train()
    with pytest.raises(SpecError, match="No layer"):
        cp.compare({"net": network}, data=images(8), layers="nowhere")
    assert network.training


def test_one_network_may_stand_twice_and_agrees_with_itself() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU())
    similarity = cp.compare({"a": network, "b": network}, data=images(12), layers="all")
    np.testing.assert_allclose(similarity.between("a", "b").values, similarity.between("a", "a").values, atol=1e-12)


@pytest.mark.slow
def test_pooling_takes_the_mean_or_the_class_token() -> None:
    data = images(16, 32)
    vit = cp.load_subject("zoo:vit").network
    with torch.no_grad():
        tokens = vit.blocks[0](vit._pos_embed(vit.patch_embed(data)))
        last = vit.forward_features(data)
    pooled = {
        pool: cp.compare({"vit": vit}, data=data, layers="blocks.0,norm", pool=pool).values[0, 1]
        for pool in ("none", "mean", "cls")
    }
    expected = {
        "none": cp.linear_cka(tokens.flatten(1), last.flatten(1)),
        "mean": cp.linear_cka(tokens[:, 1:].mean(1), last[:, 1:].mean(1)),
        "cls": cp.linear_cka(tokens[:, 0], last[:, 0]),
    }
    assert pooled == pytest.approx(expected, abs=1e-6)
    with pytest.raises(SpecError, match="needs a network with a class token"):
        cp.compare(["zoo:cnn"], examples=8, pool="cls")


def test_the_result_says_how_it_was_made(joint: cp.Similarity) -> None:
    made = joint.provenance
    assert made.data is not None
    assert made.data.as_record() == {
        "source": "digits",
        "images": 1797,
        "examples": 96,
        "sample_sha256": made.data.sample_sha256,
    }
    assert (made.batch_size, made.batches, made.debiased) == (32, 3, True)
    assert [subject.name for subject in made.subjects] == list(joint.models)
    assert made.subjects[0].weights.startswith("cnn.safetensors, sha256 ")
    assert made.versions["torch"] == torch.__version__.partition("+")[0]


def test_shuffled_control_is_near_zero_and_below_the_values(joint: cp.Similarity) -> None:
    assert np.abs(joint.null).mean() < 0.05
    assert joint.values.mean() > 5 * np.abs(joint.null).mean()


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int]] = []
    cp.compare({"net": Reused()}, data=images(20), layers="all", batch_size=8, progress=lambda *now: told.append(now))
    assert told == [(8, 20), (16, 20), (20, 20)]


def test_image_size_mean_and_std_can_be_given_for_all() -> None:
    similarity = cp.compare(["zoo:cnn"], examples=8, image_size=48, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    preprocessing = similarity.provenance.subjects[0].preprocessing
    assert (preprocessing["size"], preprocessing["mean"]) == ([3, 48, 48], [0.5, 0.5, 0.5])
    with pytest.raises(SpecError, match="mean must hold a number for each of the 3 channels"):
        cp.compare(["zoo:cnn"], examples=8, mean=(0.5,))


def test_tensors_are_used_as_they_are() -> None:
    similarity = cp.compare({"net": Reused()}, data=images(8), layers="all")
    assert similarity.provenance.subjects[0].preprocessing == "none: the data are tensors"
    with pytest.raises(SpecError, match="the data are tensors"):
        cp.compare({"net": Reused()}, data=images(8), layers="all", image_size=16)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"models": []}, SpecError, "least one model"),
        ({"models": ["zoo:cnn", "zoo:cnn"]}, SpecError, "Give them names: first=zoo:cnn second=zoo:cnn"),
        ({"models": [3]}, SpecError, "but got int"),
        ({"measures": "cca"}, SpecError, "Unknown measure 'cca'.* All measures: cka, cka-rbf"),
        ({"pool": "max"}, SpecError, "--pool must be one of none, mean, cls, but is 'max'"),
        ({"measures": "rsa", "influence": 3}, SpecError, "the measures are rsa. Add cka"),
        ({"measures": "mutual-knn:0"}, SpecError, "neighbours of mutual-knn must be a whole number from 1 to"),
        ({"measures": "mutual-knn:8"}, SpecError, "neighbours of mutual-knn:8 must be fewer than the 8 examples"),
        ({"measures": "rsa", "scratch": "/dev/null/scratch"}, OutputError, "must be one that can be written"),
        (
            {"models": ["zoo:cnn", "zoo:vit"], "measures": ["cka", "mmd"]},
            SpecError,
            r"Distances \(mmd\) compare a layer with",
        ),
        ({"batch_size": 3}, SpecError, "--batch-size must be a whole number from 4 .*4 images a batch"),
        ({"examples": 3}, SpecError, "--examples must be a whole number from 4 to 1,000,000,000"),
        ({"layers": "block.3"}, SpecError, "No layer of 'zoo:vit' matches 'block.3'. Close names: 'blocks.3'"),
        ({"device": "cuda:99"}, SpecError, "--device must be auto or one of cpu.*, but is 'cuda:99'"),
        ({"device": "nonsense"}, SpecError, "--device must be auto or one of cpu.*, but is 'nonsense'"),
        ({"device": "mps"}, SpecError, "no float64"),
        (
            {"measures": "cka-rbf:-1.0"},
            SpecError,
            "threshold of cka-rbf must be a number from 0.001 to 1,000,000, but is -1.0",
        ),
    ],
)
def test_bad_options_say_what_must_hold(options: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"models": ["zoo:vit"], "examples": 8, **options}
    with pytest.raises(error, match=message):
        cp.compare(arguments.pop("models"), **arguments)  # type: ignore[call-overload]


def test_a_network_that_cannot_see_the_images_is_named() -> None:
    with pytest.raises(NetworkError, match=r"'zoo:vit' cannot be run.*\(3, 48, 48\)"):
        cp.compare(["zoo:vit"], examples=8, image_size=48)


def test_a_network_that_runs_differently_from_batch_to_batch_is_named() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sometimes = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.sometimes(x.flatten(1)) if len(x) < 8 else x.flatten(1)

    with pytest.raises(NetworkError, match="'net' must call the same layers, but this one left out sometimes"):
        cp.compare({"net": Fickle()}, data=images(16), layers="sometimes", batch_size=8)


@pytest.mark.parametrize(
    "raised", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_out_of_memory_names_layer_and_batch_size_and_a_smaller_one(raised: BaseException) -> None:
    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                raise raised
            return x

    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(192, 4), Hungry()))
    with pytest.raises(
        OutOfMemoryError,
        match=r"layer '1\.1' of the forward pass of 'net' with 16 images at a time. Try --batch-size 8",
    ):
        cp.compare({"net": network}, data=images(16), layers="1.0", batch_size=16)


def test_more_examples_do_not_need_more_memory() -> None:
    """The state is sums: what a measure holds after a batch does not depend on how many there were."""
    from cka_probe.estimation.gram import Features

    measure = start("cka", ["a", "b"])

    def held() -> int:
        (sums,) = measure._sums.values()  # type: ignore[attr-defined]
        return sum(value.numel() for value in vars(sums).values() if isinstance(value, Tensor))

    sizes = []
    for batch in range(3):
        for layer in range(2):
            measure.prepare(layer, Features(torch.randn(8, 30)))
        measure.update(8 * batch)
        sizes.append(held())
    assert len(set(sizes)) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu() -> None:
    there, here = (cp.compare(["zoo:cnn", "zoo:vit"], examples=96, batch_size=32, device=d) for d in ("cuda", "cpu"))
    np.testing.assert_allclose(there.values, here.values, atol=1e-4)  # other convolution algorithms


@pytest.mark.full
@pytest.mark.data
def test_real_photographs_through_networks_of_two_families(cifar100: Path) -> None:
    similarity = cp.compare(
        ["resnet18@random", "deit_tiny_patch16_224,img_size=32,patch_size=4@random"],
        data=cifar100, examples=128, batch_size=32, image_size=32, layers="stages", workers=1,
    )  # fmt: skip
    assert similarity.values.shape == (8, 8)
    assert similarity.provenance.data.examples == 128
    assert similarity.values[0, 4] > 0.3, "early layers of random networks still agree on the pixels"
    assert math.isfinite(similarity.std_error.max())


def test_a_distance_between_two_networks_is_given_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, object] = {"layers": "stages", "measures": "mmd", "examples": 16}
    apart = cp.compare(["zoo:cnn", "zoo:cnn-2"], **options)  # type: ignore[call-overload]
    assert "mmd is without meaning for zoo:cnn × zoo:cnn-2" in caplog.text
    assert any("says nothing: zoo:cnn × zoo:cnn-2" in caution for caution in cautions(apart))
    caplog.clear()
    views = cp.compare(["zoo:cnn"], views="identity,gray", **options)  # type: ignore[call-overload]
    assert "without meaning" not in caplog.text
    assert not any("says nothing" in caution for caution in cautions(views))


@pytest.mark.slow
def test_amp_runs_the_networks_in_bfloat16_and_nothing_else() -> None:
    network = timm.create_model("resnet18")
    dtypes = []
    network.layer1.register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    options = {"data": "digits", "examples": 48, "batch_size": 16, "layers": "stages", "image_size": 32}
    exact = cp.compare({"a": network, "b": "zoo:cnn"}, **options)
    coarse = cp.compare({"a": network, "b": "zoo:cnn"}, amp=True, **options)
    assert dtypes[-1] == torch.bfloat16
    assert coarse.provenance.amp
    assert coarse.values.dtype == np.float64
    difference = np.abs(coarse.values - exact.values).max()
    assert 0 < difference < 0.02  # activations of 8 bits, through 18 layers
