"""Images that cannot be read, found before a run that leaves them out: all networks and processes skip the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cka_probe.errors import DataError
from cka_probe.images.loading_time import explaining_lost_workers
from cka_probe.images.sources.bit_depth import as_mode
from cka_probe.images.sources.files import READ_ERRORS
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.streams import Read, Stream
from cka_probe.images.sources.subset import Subset
from cka_probe.runtime.devices import cores
from cka_probe.runtime.files import reason
from cka_probe.runtime.names import readable
from cka_probe.runtime.world import World

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_SHOWN = 3
_AT_ONCE = 32


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read.

    Attributes:
        index: its number in its source.
        place: what messages call it.
        error: why it cannot be read.
    """

    index: int
    place: str
    error: str


@dataclass(frozen=True)
class Search:
    """Reads images to find those that are broken, each once, shared among the processes of a run.

    Attributes:
        world: the processes; all of them must make the same calls.
        workers: processes that decode images for each of them; by default a core less than there are.
    """

    world: World
    workers: int | None = None

    def __call__(self, sources: Sequence[ImageSource], indices: NDArray[np.int64]) -> tuple[BrokenImage, ...]:
        """The broken ones among images of a source, the same on all processes.

        Args:
            sources: one, or the two of pairs: a pair is broken where one of its images is.
            indices: which; ascending for a stream.

        Raises:
            DataError: all of them are broken, or a stream cannot be read on.
        """
        first = sources[0]
        if all(source.in_memory for source in sources) or not len(indices):
            return ()
        logger.info("Reading %d images of %s to find broken ones.", len(indices), first.name)
        found = self._of_stream(first, indices) if isinstance(first, Stream) else self._by_number(sources, indices)
        of_all = sorted((one for some in self.world.gathered(list(found)) for one in some), key=lambda one: one.index)
        if len(of_all) == len(indices):
            raise DataError(
                f"None of the {len(indices)} images of {first.name} could be read. The first: {of_all[0].place} "
                f"({of_all[0].error})."
            )
        return tuple(of_all)

    def _by_number(self, sources: Sequence[ImageSource], indices: NDArray[np.int64]) -> Iterator[BrokenImage]:
        own = indices[self.world.rank :: self.world.size]
        workers = max(1, min(8, (cores() - 1) // self.world.on_this_machine)) if self.workers is None else self.workers
        loader: Iterable[list[tuple[str, str]]] = DataLoader(
            _Read(sources, own),
            batch_size=_AT_ONCE,
            num_workers=min(workers, -(-len(own) // _AT_ONCE)),
            collate_fn=list,
            generator=torch.Generator(),  # it draws from the global one otherwise
        )
        read = (one for some in explaining_lost_workers(loader) for one in some)
        for index, (place, error) in zip(own.tolist(), read, strict=True):
            if error:
                yield BrokenImage(index, place, error)

    def _of_stream(self, source: Stream, indices: NDArray[np.int64]) -> Iterator[BrokenImage]:
        for index, read in source.reads_of(indices):
            if source.decodes_late and index % self.world.size != self.world.rank:
                continue
            error = _error_of(read)
            if error and index % self.world.size == self.world.rank:
                yield BrokenImage(index, source.place(index), error)


def without(source: ImageSource, broken: Sequence[BrokenImage]) -> ImageSource:
    """The images of a source without the broken ones."""
    if not broken:
        return source
    return Subset(source, readable_indices(np.arange(len(source)), broken), source.name)


def readable_indices(indices: NDArray[np.int64], broken: Sequence[BrokenImage]) -> NDArray[np.int64]:
    """Numbers of images without those of the broken ones, in their order."""
    return indices[~np.isin(indices, [one.index for one in broken])]


def with_substitutes(source: ImageSource, broken: Sequence[BrokenImage]) -> ImageSource:
    """As many images as the source has: the next readable one, with its own label, in place of each broken one.

    After the last image comes the first.
    """
    if not broken:
        return source
    good = readable_indices(np.arange(len(source)), broken)
    following = np.searchsorted(good, np.arange(len(source))) % len(good)
    return Subset(source, good[following], source.name)


def describe_broken(broken: Sequence[BrokenImage]) -> str:
    """How many images are broken, and the first few of them, for a reader.

    >>> describe_broken([BrokenImage(3, "cats/3.png", "OSError: image file is truncated")])
    '1 image could not be read: cats/3.png'
    """
    shown = ", ".join(readable(one.place) for one in broken[:_SHOWN])
    more = ", …" if len(broken) > _SHOWN else ""
    return f"{len(broken)} image{'s' if len(broken) > 1 else ''} could not be read: {shown}{more}"


def broken_record(broken: Sequence[BrokenImage]) -> dict[str, Any]:
    """What a record says of broken images, all of them by name; nothing where there are none."""
    return (
        {"broken": [{"image": readable(one.place), "error": readable(one.error)} for one in broken]} if broken else {}
    )


class _Read(Dataset[Any]):
    """What messages call an image (of a pair the first that is broken), and why it is broken; empty if it is not."""

    def __init__(self, sources: Sequence[ImageSource], indices: NDArray[np.int64]) -> None:
        self._sources, self._indices = sources, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple[str, str]:
        index = int(self._indices[position])
        for source in self._sources:
            error = _error_of(partial(_image, source, index))
            if error:
                return source.place(index), error
        return "", ""


def _image(source: ImageSource, index: int) -> Image | Tensor:
    return source.read(index)[0]


def _error_of(read: Read) -> str:
    """Why an image cannot be read, in one line; empty where it can."""
    try:
        image = read()
        if not isinstance(image, Tensor):
            as_mode(image, "RGB")  # it decodes what a data set left undecoded
    except READ_ERRORS as error:
        return reason(error.__cause__ if isinstance(error, DataError) and error.__cause__ is not None else error)
    return ""
