"""Views: functions of an image, so that one model can be compared with itself on two versions of the same scenes.

identity            the image as the network sees it
gray                without colours
blur:SIGMA          Gaussian blur, its standard deviation in pixels
jpeg:QUALITY        compressed as JPEG and read again, quality 1 to 100
noise:STD           Gaussian noise in every pixel and channel, its standard deviation on the scale 0 to 1
catvision           as a cat sees it, by the package catvision
file.py:function    any function of the user's own, from a PIL image to one of the same size

A view is applied after the network's own resizing and cropping, before normalization: its pixels are those of the
network's input, as in ImageNet-C (Hendrycks & Dietterich 2019), and its strength does not depend on the size of a file.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import DataError, SpecError
from cka_probe.runtime.names import name_bytes
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.user_code import describe_error
from cka_probe.runtime.user_files import code_sha256, is_user_file, user_callable

if TYPE_CHECKING:
    from PIL.Image import Image

CATVISION_PIXELS = 224
"""The filter's blur and distortion depend on the size of the image; its authors work at this one."""

ImageFunction = Callable[["Image"], "Image"]
Apply = Callable[["Image", str], "Image"]


@dataclass(frozen=True)
class View:
    """A function of an image, known by its name.

    Attributes:
        name: stands in brackets behind that of the model: ``"blur:2"``.
        apply: from an RGB or gray image and its identity in its data set to an image of the same size.
        record: what else a reader must know to make the view again.
    """

    name: str
    apply: Apply = field(compare=False)
    record: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __call__(self, image: Image, identity: str) -> Image:
        """The image through the view, in the same mode; its opacity stays.

        Raises:
            DataError: the view raises, or its result is no image of the same size.
        """
        from PIL.Image import Image as PILImage

        if self.apply is _identity:
            return image
        if image.mode in ("LA", "RGBA"):
            colours = self(image.convert(image.mode[:-1]), identity)
            colours.putalpha(image.getchannel("A"))
            return colours
        try:
            seen = self.apply(image, identity)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's function may raise anything; SystemExit would end a worker process
            raise DataError(
                f"The view {self.name!r} could not be applied: {describe_error(error, with_place=False)}"
            ) from error
        if not isinstance(seen, PILImage) or seen.size != image.size:
            got = f"one of {_pixels(seen)}" if isinstance(seen, PILImage) else type(seen).__name__
            raise DataError(
                f"The view {self.name!r} must return an image of the size that it gets, {_pixels(image)}, but returned "
                f"{got}."
            )
        return seen if seen.mode == image.mode else seen.convert(image.mode)


def _identity(image: Image, _: str) -> Image:
    return image


IDENTITY = View("identity", _identity)


def parse_views(views: str | Sequence[str | ImageFunction | View]) -> tuple[View, ...]:
    """The views that are named: a comma-separated string, or a sequence of specs and of functions of an image.

    Raises:
        SpecError: one cannot be understood, or two have the same name.

    >>> [view.name for view in parse_views("identity, blur:2")]
    ['identity', 'blur:2']
    """
    given = [part for part in views.split(",") if part.strip()] if isinstance(views, str) else views
    parsed = tuple(_parse(view.strip()) if isinstance(view, str) else _given(view) for view in given)
    names = [view.name for view in parsed]
    if not names or len(set(names)) < len(names):
        raise SpecError(f"The views must be one or more, each with a name of its own, but are: {', '.join(names)}.")
    return parsed


def _parse(spec: str) -> View:
    if is_user_file(spec):
        with user_callable(spec, "view"):  # what cannot be found is reported before the work, not in a worker process
            record = {"file": spec, "code_sha256": code_sha256(spec)}
            return View(spec.rpartition(":")[2], partial(_by_file, spec), record)
    kind, colon, text = spec.partition(":")
    if kind not in _PLAIN and kind not in _GRADED:
        known = ", ".join([*_PLAIN, *(f"{name}:{grade.unit}" for name, grade in _GRADED.items()), "file.py:function"])
        raise SpecError(f"A view must be one of {known}, but got {spec!r}.")
    if kind in _PLAIN:
        if colon:
            raise SpecError(f"The view {kind!r} takes no number, but got {spec!r}.")
        return _PLAIN[kind]()
    grade = _GRADED[kind]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (grade.low <= number <= grade.high and number > 0) or (grade.whole and number != round(number)):
        raise SpecError(f"The view {kind!r} must be {kind}:{grade.unit}, {grade.range}, but got {spec!r}.")
    return View(f"{kind}:{number:g}", partial(grade.apply, number), {grade.unit.lower(): number})


def _given(view: ImageFunction | View) -> View:
    if isinstance(view, View):
        return view
    if not callable(view):
        raise SpecError(f"A view must be a spec or a function from an image to an image, but got {view!r}.")
    return View(getattr(view, "__name__", type(view).__name__), _OfImage(view))


@dataclass(frozen=True)
class _OfImage:
    """A function that does not ask for the identity; a class, since worker processes may get it pickled."""

    function: ImageFunction

    def __call__(self, image: Image, identity: str) -> Image:
        with _seeded_by(identity):
            return self.function(image)


def _gray(image: Image, _: str) -> Image:
    return image.convert("L")


def _blur(sigma: float, image: Image, _: str) -> Image:
    from scipy.ndimage import gaussian_filter1d

    pixels = np.asarray(image, dtype=np.float32)
    return _image(gaussian_filter1d(gaussian_filter1d(pixels, sigma, axis=0), sigma, axis=1))


def _jpeg(quality: float, image: Image, _: str) -> Image:
    import PIL.Image

    compressed = io.BytesIO()
    image.save(compressed, "JPEG", quality=round(quality))
    return PIL.Image.open(compressed)


def _noise(std: float, image: Image, identity: str) -> Image:
    # Seeded by the image alone: the same noise whatever the batch, the worker process, the sample or the strength.
    rng = np.random.default_rng(list(hashlib.sha256(name_bytes(identity)).digest()))
    pixels = np.asarray(image, dtype=np.float64)
    return _image(pixels + 255 * std * rng.standard_normal(pixels.shape))


def _by_file(spec: str, image: Image, identity: str) -> Image:
    function = _function(spec)
    with _seeded_by(identity):
        seen: Image = function(image)
    return seen


@contextmanager
def _seeded_by(identity: str) -> Iterator[None]:
    """Within the block, random numbers follow from the image, as those of `_noise` do; no other sees them used."""
    with keeping_random_state():
        seed_everything(*hashlib.sha256(identity.encode()).digest())
        yield


@cache
def _function(spec: str) -> ImageFunction:
    """Once a process: a worker that was spawned imports the file itself."""
    with user_callable(spec, "view") as function:
        return function


def _catvision() -> View:
    _cat_filter()
    record = {"pixels": CATVISION_PIXELS, "package": f"catvision {version('catvision')}"}
    return View("catvision", _as_a_cat, record)


def _as_a_cat(image: Image, _: str) -> Image:
    import PIL.Image

    square = (CATVISION_PIXELS, CATVISION_PIXELS)
    scene = image.convert("RGB").resize(square, PIL.Image.Resampling.BICUBIC)
    # OpenCV's order of the channels, which the filter expects, and back.
    bgr = np.ascontiguousarray(np.asarray(scene)[:, :, ::-1])
    seen = PIL.Image.fromarray(np.ascontiguousarray(_cat_filter()(bgr)[:, :, ::-1]))
    return seen.resize(image.size, PIL.Image.Resampling.BICUBIC)


@cache
def _cat_filter() -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    try:
        with warnings.catch_warnings():  # importing catvision 1.0.0 turns off all warnings of the process
            import cv2
            from catvision import CatVisionFilter
    except ImportError as error:
        raise SpecError(
            "The view 'catvision' needs the package catvision, which cannot be imported: "
            f"{error}. Install it with: pip install 'cka-probe[catvision]'"
        ) from error
    cv2.setNumThreads(0)  # OpenCV's threads do not outlive the fork of a worker process, which would wait for them
    apply: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = CatVisionFilter().apply_cat_vision
    return apply


def _image(pixels: NDArray[np.floating[Any]]) -> Image:
    import PIL.Image

    return PIL.Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _pixels(image: Image) -> str:
    return f"{image.width} x {image.height} pixels"


@dataclass(frozen=True)
class _Grade:
    """A view with a strength.

    Attributes:
        apply: from the strength, an image and its identity.
        unit: what the strength is called.
        low: its smallest value.
        high: its largest.
        range: the two, for messages.
        whole: whether it is a whole number.
    """

    apply: Callable[[float, Image, str], Image]
    unit: str
    low: float
    high: float
    range: str
    whole: bool = False


_PLAIN: dict[str, Callable[[], View]] = {
    "identity": lambda: IDENTITY,
    "gray": lambda: View("gray", _gray),
    "catvision": _catvision,
}
_GRADED: dict[str, _Grade] = {
    "blur": _Grade(_blur, "SIGMA", 0, 1000, "a number of pixels above 0 and up to 1000"),
    "jpeg": _Grade(_jpeg, "QUALITY", 1, 100, "a whole number from 1 to 100", whole=True),
    "noise": _Grade(_noise, "STD", 0, 10, "a number above 0 and up to 10, where 1 is from black to white"),
}
