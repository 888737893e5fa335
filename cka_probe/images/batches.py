"""Samples batch by batch: each image read once, and turned into one tensor a subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from cka_probe.errors import DataError
from cka_probe.images.fingerprints import image_digest
from cka_probe.images.samples import Samples
from cka_probe.images.sources.files import READ_ERRORS, naming_unreadable, unreadable
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.streams import Stream
from cka_probe.runtime.devices import cores
from cka_probe.runtime.ranges import MIN_EXAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image", str], Tensor]
"""From an image and its identity to a tensor."""


def batch_count(examples: int, batch_size: int) -> int:
    """How many batches so many examples make; a last one of fewer than 4 is none."""
    whole, rest = divmod(examples, batch_size)
    return whole + (rest >= MIN_EXAMPLES)


@dataclass(frozen=True)
class Loading:
    """How images are loaded.

    Attributes:
        batch_size: images in a batch.
        workers: processes that read and transform them; 0 does it in this one.
        pin_memory: for a GPU.
        numbers: of the batches that are wanted, ascending; all of them where None.
        note: called with the number of the first example of each batch, and the (n,) int64 hashes of its images.
    """

    batch_size: int
    workers: int = 0
    pin_memory: bool = False
    numbers: Sequence[int] | None = None
    note: Callable[[int, Tensor], None] | None = None


def batches(
    samples: Samples, transforms: Sequence[Transform], loading: Loading, sides: Sequence[int] | None = None
) -> Iterator[list[Tensor]]:
    """The images batch by batch: a list of one (n, c, h, w) tensor a transform, all of the same n images.

    A last batch of fewer than 4 is dropped.

    Args:
        samples: which images.
        transforms: what becomes of them.
        loading: how.
        sides: for each transform, which image of a pair it is given; the first for all of them where None.

    Raises:
        DataError: an image cannot be read; the message names it. Or a stream ends before it should.
    """
    batch_size, workers, numbers, note = loading.batch_size, loading.workers, loading.numbers, loading.note
    prepare = _Prepare(transforms, [0] * len(transforms) if sides is None else sides)
    wanted = range(batch_count(len(samples), batch_size)) if numbers is None else numbers
    if not wanted:
        return
    source = samples.source
    options: dict[str, Any] = {"pin_memory": loading.pin_memory, "collate_fn": _collate}
    loader: DataLoader[Any]
    if isinstance(source, Stream):
        count = min(workers, len(wanted) if source.decodes_late else 1)
        by_worker = [frozenset(wanted[worker :: max(count, 1)]) for worker in range(max(count, 1))]
        stream = _TransformedStream(samples, prepare, batch_size, by_worker)
        loader = DataLoader(stream, batch_size=batch_size, num_workers=count, **options)
    else:
        spans: Any = [range(number * batch_size, min((number + 1) * batch_size, len(samples))) for number in wanted]
        loader = DataLoader(
            _Transformed(samples, prepare), batch_sampler=spans, num_workers=min(workers, len(spans)), **options
        )
    for batch, number in zip(loader, wanted, strict=False):
        if isinstance(batch, str):
            raise DataError(batch)
        *tensors, digests = batch
        if note is not None:
            note(number * batch_size, digests)
        yield tensors


def default_workers(source: ImageSource, sharing: int = 1) -> int:
    """How many processes should decode images: none where they lie in memory; else a core less than all.

    Args:
        source: of the images.
        sharing: how many processes like this one share the machine.
    """
    return 0 if source.in_memory else max(1, min(8, (cores() - 1) // sharing))


class _Transformed(Dataset[Any]):
    def __init__(self, samples: Samples, prepare: _Prepare) -> None:
        self._samples = samples
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> list[Tensor] | str:
        index = int(self._samples.indices[position])
        images = []
        for source in filter(None, (self._samples.source, self._samples.paired)):
            try:
                images.append(source.read(index)[0])
            except DataError as error:
                return str(error)  # raised in a worker process, it would bring its traceback
        return self._prepare(images, self._samples.source, index)


class _TransformedStream(IterableDataset[Any]):
    """The images of the wanted batches of a stream; each worker reads all of it, and decodes those of its own."""

    def __init__(
        self, samples: Samples, prepare: _Prepare, batch_size: int, by_worker: Sequence[frozenset[int]]
    ) -> None:
        self._samples = samples
        self._prepare = prepare
        self._batch_size = batch_size
        self._by_worker = by_worker

    def __iter__(self) -> Iterator[list[Tensor] | str]:
        source = self._samples.source
        assert isinstance(source, Stream)
        worker = get_worker_info()
        wanted = self._by_worker[worker.id if worker is not None else 0]
        try:
            reads = islice(source.reads_of(self._samples.indices), (max(wanted) + 1) * self._batch_size)
            for position, (index, read) in enumerate(reads):
                if position // self._batch_size in wanted:
                    with naming_unreadable(source.place(index)):
                        image = read()
                    yield self._prepare([image], source, index)
        except DataError as error:
            yield str(error)


@dataclass(frozen=True)
class _Prepare:
    """The tensor of each transform, and the hash of the image; or what failed, as a message.

    Raised in a worker process, an error would bring its traceback.
    """

    transforms: Sequence[Transform]
    sides: Sequence[int]

    def __call__(self, images: Sequence[Image | Tensor], source: ImageSource, index: int) -> list[Tensor] | str:
        identity = source.identity(index)
        tensors = []
        try:
            for transform, side in zip(self.transforms, self.sides, strict=True):
                image = images[side]  # a tensor is what the networks see already
                tensors.append(image if isinstance(image, Tensor) else transform(image, identity))
            return [*tensors, torch.tensor(image_digest(images))]
        except DataError as error:  # of a view
            return f"{error} The image was {source.place(index)}."
        except READ_ERRORS as error:
            return unreadable(source.place(index), error)


def _collate(items: list[list[Tensor] | str]) -> list[Tensor] | str:
    tensors = []
    for item in items:
        if isinstance(item, str):
            return item
        tensors.append(item)
    for column in zip(*tensors, strict=True):
        shapes = dict.fromkeys(tuple(tensor.shape) for tensor in column)
        if len(shapes) > 1:
            return f"All images of a data set of tensors must have one shape, but have {', '.join(map(str, shapes))}."
    return [torch.stack(column) for column in zip(*tensors, strict=True)]
