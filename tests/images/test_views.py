"""A view does to an image what its name says, at the network's size, the same in every process."""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.errors import DataError, SpecError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source
from cka_probe.images.views import IDENTITY, View, parse_views

PLAIN = Preprocessing(size=(3, 24, 24), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 20), seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def seen(spec: str, image: Image.Image, identity: str = "a") -> np.ndarray:
    (view,) = parse_views(spec)
    result = view(image, identity)
    assert (result.mode, result.size) == (image.mode, image.size)
    return np.asarray(result).astype(float)


def naive_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian weights up to four standard deviations, the image mirrored at its edges, one axis after the other."""
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(pixels.ndim)]
        padded = np.pad(pixels, pad, mode="symmetric")
        length = pixels.shape[axis]
        pixels = sum(w * padded.take(range(i, i + length), axis) for i, w in enumerate(weights))
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_blur_is_a_gaussian_in_pixels_of_the_image(mode: str) -> None:
    image = picture(mode)
    expected = naive_blur(np.asarray(image).astype(float), 1.5)
    assert np.abs(seen("blur:1.5", image) - expected).max() <= 0.51  # of rounding to whole grays


def test_gray_is_the_luma_in_every_channel_and_nothing_to_a_gray_image() -> None:
    image = picture()
    luma = np.asarray(image).astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.abs(seen("gray", image) - luma[..., None]).max() <= 1
    assert (seen("gray", picture("L")) == np.asarray(picture("L"))).all()


def test_jpeg_is_a_file_of_that_quality_read_again() -> None:
    image = picture()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    assert (seen("jpeg:30", image) == np.asarray(Image.open(file))).all()
    original = np.asarray(image).astype(float)
    errors = [np.abs(seen(f"jpeg:{quality}", image) - original).mean() for quality in (95, 50, 5)]
    assert errors == sorted(errors)


def test_noise_has_the_spread_it_says_and_belongs_to_the_image() -> None:
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    first = seen("noise:0.1", gray) - 128
    assert first.std() == pytest.approx(25.5, rel=0.03)  # of 12,288 values: 5 standard errors
    assert abs(first.mean()) < 5 * 25.5 / np.sqrt(first.size)
    assert (seen("noise:0.1", gray) - 128 == first).all(), "the same image has the same noise in every run"
    other = seen("noise:0.1", gray, "b") - 128
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05
    assert np.abs((seen("noise:0.05", gray) - 128) * 2 - first).max() <= 1.5, "half the strength, the same pattern"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 12])
def test_noise_does_not_depend_on_batches_and_processes(image_folder: Path, workers: int, batch_size: int) -> None:
    samples = sample(open_source(image_folder), 12, 0)
    transform = PLAIN.transform(parse_views("noise:0.1")[0])
    drawn = [b[0] for b in batches(samples, [transform], Loading(batch_size, workers))]
    for position, tensor in enumerate(torch.cat(drawn)):
        index = int(samples.indices[position])
        expected = transform(samples.source.read(index)[0], samples.source.identity(index))  # type: ignore[arg-type]
        torch.testing.assert_close(tensor, expected)


def test_a_view_sees_the_image_at_the_network_s_size_before_normalization() -> None:
    sizes = []

    def spy(image: Image.Image) -> Image.Image:
        sizes.append((image.mode, image.size))
        return Image.new("RGB", image.size, (255, 0, 0))

    network = Preprocessing(size=(3, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    tensor = network.transform(parse_views([spy])[0])(picture(size=(100, 60)))
    assert sizes == [("RGB", (16, 16))]
    assert tensor[:, 0, 0].tolist() == [1, -1, -1]


def test_the_identity_changes_no_pixel() -> None:
    image = picture(size=(40, 30))
    torch.testing.assert_close(PLAIN.transform(IDENTITY)(image), PLAIN.transform()(image), rtol=0, atol=0)
    assert parse_views("identity") == (IDENTITY,)


def test_views_survive_the_way_into_a_worker_that_is_spawned() -> None:
    for view in parse_views("identity,gray,blur:1,jpeg:50,noise:0.1"):
        again = pickle.loads(pickle.dumps(PLAIN.transform(view)))
        torch.testing.assert_close(again(picture(), "a"), PLAIN.transform(view)(picture(), "a"), rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_s_function_is_a_view_and_its_failure_names_the_image(
    tmp_path: Path, image_folder: Path, workers: int
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from PIL import ImageOps\n"
        "def upside_down(image):\n    return ImageOps.flip(image)\n"
        "def broken(image):\n    raise KeyError('eye')\n"
        "def smaller(image):\n    return image.resize((3, 3))\n"
        "def number(image):\n    return 7\n"
    )
    (view,) = parse_views(f"{file}:upside_down")
    assert view.name == "upside_down"
    assert (seen(f"{file}:upside_down", picture()) == np.asarray(picture())[::-1]).all()
    samples = sample(open_source(image_folder), 8, 0)
    for name, said in (
        ("broken", r"KeyError: 'eye'\. The image was .*png"),
        ("smaller", "24 x 24 pixels, but returned one of 3 x 3"),
        ("number", "but returned int"),
    ):
        transform = PLAIN.transform(parse_views(f"{file}:{name}")[0])
        with pytest.raises(DataError, match=said) as caught:
            list(batches(samples, [transform], Loading(8, workers)))
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ("", "must be one or more"),
        ("blur:2,blur:2.0", "a name of its own"),
        ("blurred", "A view must be one of identity, gray, catvision, blur:SIGMA"),
        ("blur", "must be blur:SIGMA, a number of pixels above 0"),
        ("blur:0", "above 0"),
        ("blur:nan", "above 0"),
        ("jpeg:50.5", "a whole number from 1 to 100"),
        ("jpeg:0", "from 1 to 100"),
        ("noise:-1", "above 0"),
        ("gray:2", "takes no number"),
        ("nowhere.py:view", "The file of a view must exist"),
        ([3], "a spec or a function"),
    ],
)
def test_a_view_that_cannot_be_understood_says_what_there_is(views: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_views(views)


def test_functions_and_views_may_be_given_from_python() -> None:
    def inverted(image: Image.Image) -> Image.Image:
        return image.point(lambda value: 255 - value)

    mine = View("mine", lambda image, identity: image)
    assert [view.name for view in parse_views(["identity", inverted, mine])] == ["identity", "inverted", "mine"]


@pytest.mark.slow
def test_catvision_is_its_authors_filter_at_224_pixels_in_opencv_s_order_of_channels() -> None:
    catvision = pytest.importorskip("catvision")
    image = picture(size=(224, 224))
    bgr = np.asarray(image)[:, :, ::-1].copy()
    expected = catvision.CatVisionFilter().apply_cat_vision(bgr)[:, :, ::-1]
    assert (seen("catvision", image) == expected).all()
    (view,) = parse_views("catvision")
    assert view.record == {"pixels": 224, "package": "catvision 1.0.0"} or view.record["pixels"] == 224
    assert seen("catvision", picture("L", (32, 32))).shape == (32, 32)


def test_catvision_leaves_the_warnings_of_the_process_on() -> None:
    pytest.importorskip("catvision")
    parse_views("catvision")
    with pytest.warns(UserWarning, match="still told"):
        warnings.warn("still told", stacklevel=1)


def test_catvision_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cka_probe.images.views import _cat_filter

    _cat_filter.cache_clear()
    monkeypatch.setitem(sys.modules, "catvision", None)
    with pytest.raises(SpecError, match=r"pip install 'cka-probe\[catvision\]'"):
        parse_views("identity,catvision")
