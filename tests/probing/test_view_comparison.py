"""One model on two versions of the same images: the controls that prove the tool, on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cka_probe as cp
from cka_probe.errors import DataError, SpecError
from cka_probe.images.sources.digits import digits
from cka_probe.images.views import parse_views
from cka_probe.networks.models import load_subject

QUICK = {"examples": 96, "batch_size": 32, "layers": "stages"}


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits") / "upright"
    root.mkdir()
    for index, image in enumerate(digits("validation")[0][:96]):
        image.save(root / f"{index:03}.png")
    return root


def same(image: Image.Image) -> Image.Image:
    return image.copy()


def test_identical_views_are_identical_layer_by_layer() -> None:
    results = cp.compare(["zoo:cnn"], views=["identity", same], measures=["cka", "cka-rbf"], **QUICK)
    for similarity in results.values():
        assert similarity.models == ("zoo:cnn [identity]", "zoo:cnn [same]")
        block = similarity.between(*similarity.models)
        np.testing.assert_allclose(block.values.diagonal(), 1, atol=1e-9)  # float64 sums of the same numbers
        np.testing.assert_allclose(block.values, block.values.T, atol=1e-9)


@pytest.mark.slow
def test_a_folder_paired_with_itself_is_identical_and_with_shuffled_partners_unrelated(
    digit_folder: Path, tmp_path: Path
) -> None:
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    paths = sorted(digit_folder.iterdir())
    order = np.random.default_rng(0).permutation(len(paths))
    for path, other in zip(paths, order, strict=True):
        (shuffled / path.name).write_bytes(paths[other].read_bytes())
    alike = cp.compare(["zoo:cnn"], data=digit_folder, paired=digit_folder, **QUICK)
    np.testing.assert_allclose(alike.between(*alike.models).values.diagonal(), 1, atol=1e-9)
    apart = cp.compare(["zoo:cnn"], data=digit_folder, paired=shuffled, **QUICK)
    assert apart.models == ("zoo:cnn [upright]", "zoo:cnn [shuffled]")
    block = apart.between(*apart.models)
    reach = np.abs(block.null).max() + 4 * np.nanmax(block.std_error)
    assert np.abs(block.values).max() < reach < 0.3, "shuffled pairs are within the noise floor"


@pytest.mark.slow
def test_a_view_is_what_the_folder_it_would_make_is(digit_folder: Path, tmp_path: Path) -> None:
    """At the network's own size, where nothing is resized, a view and a paired folder of its images agree."""
    (view,) = parse_views("noise:0.5")
    plain, noisy = tmp_path / "plain", tmp_path / "noisy"
    for folder in (plain, noisy):
        folder.mkdir()
    for path in sorted(digit_folder.iterdir())[:48]:
        image = Image.open(path).convert("RGB").resize((32, 32))
        image.save(plain / path.name)
        view(image, path.name).save(noisy / path.name)
    options = {"layers": "stages", "batch_size": 16}
    by_view = cp.compare(["zoo:cnn"], data=plain, views="identity,noise:0.5", **options)
    by_folder = cp.compare(["zoo:cnn"], data=plain, paired=noisy, **options)
    np.testing.assert_allclose(by_view.values, by_folder.values, atol=1e-12)
    assert by_view.values[0, 4] < 0.99


def test_the_network_is_one_and_runs_once_a_view_a_batch() -> None:
    subject = load_subject("zoo:cnn")
    sizes: list[int] = []
    subject.network.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    sim = cp.compare([subject], views="identity,gray", layers="stages", examples=32, batch_size=16)
    assert sizes[-4:] == [16] * 4
    assert [s.view.name for s in sim.provenance.subjects] == ["identity", "gray"]
    assert {s.model for s in sim.provenance.subjects} == {"zoo:cnn"}
    # The digits have no colours: what differs is nothing.
    np.testing.assert_allclose(sim.between(*sim.models).values.diagonal(), 1, atol=1e-9)


@pytest.mark.slow
def test_models_and_views_cross_and_keep_their_names() -> None:
    seen: dict[str, np.ndarray] = {}
    sim = cp.compare(
        {"a": "zoo:cnn", "b": "zoo:mlp"}, views=["identity", "blur:2"], preview=seen.update, layers="stages",
        examples=16, batch_size=8,
    )  # fmt: skip
    assert sim.models == ("a [identity]", "a [blur:2]", "b [identity]", "b [blur:2]")
    assert list(seen) == list(sim.models)
    assert (seen["a [identity]"] == seen["b [identity]"]).all()
    assert np.abs(seen["a [identity]"].astype(int) - seen["a [blur:2]"]).max() > 30
    assert cp.compare(["zoo:cnn"], views="identity", layers="stages", examples=8).models == ("zoo:cnn",)
    assert cp.compare(["zoo:cnn"], views="gray", layers="stages", examples=8).models == ("zoo:cnn [gray]",)


def test_views_need_images_and_stand_alone(digit_folder: Path, tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    tensors = torch.rand(8, 3, 4, 4)
    with pytest.raises(SpecError, match="Views.*but the data are tensors"):
        cp.compare({"net": Flat()}, data=tensors, views="gray", layers="all")
    with pytest.raises(SpecError, match="either --view or --paired"):
        cp.compare(["zoo:cnn"], data=digit_folder, paired=digit_folder, views="gray")
    Image.new("L", (8, 8)).save(tmp_path / "000.png")
    with pytest.raises(DataError, match="95 of the 96 images"):
        cp.compare(["zoo:cnn"], data=digit_folder, paired=tmp_path)
