"""Images of a source in a fixed, seeded order; each read once, and turned into one tensor a subject."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from cka_probe.devices import cores
from cka_probe.errors import DataError
from cka_probe.image_files import (
    FINGERPRINTED,
    READ_ERRORS,
    files_fingerprint,
    image_digest,
    pixels_fingerprint,
    unreadable,
)
from cka_probe.kernels import MIN_EXAMPLES
from cka_probe.names import name_bytes, quoted
from cka_probe.sources import Digits, Folder, ImageSource
from cka_probe.streams import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Transform = Callable[["Image", str], Tensor]
"""From an image and its identity to a tensor."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Chosen images in a fixed order.

    Attributes:
        source: where they come from.
        indices: which, in order; (n,) int64.
        sha256: of their identities (paths or numbers, not pixels), in order: two runs on the same data with the same
            hash saw the same images.
        paired: where the second image of each pair comes from, by the same indices; None where there are no pairs.
    """

    source: ImageSource
    indices: NDArray[np.int64]
    sha256: str
    paired: ImageSource | None = None

    def __len__(self) -> int:
        return len(self.indices)


def sample(source: ImageSource, examples: int, seed: int) -> Samples:
    """``examples`` of the images (all, where there are fewer), drawn without replacement from ``seed``.

    Their order is random too: in the order of a folder, a batch would hold a class or two. Of a data set that can
    only be read in its own order (``wds/``, ``tfds/``, ``hfids/``) the first ones are taken.

    Raises:
        DataError: there are fewer than 4.
    """
    there = len(source)
    if isinstance(source, Stream) and not there:
        there = examples  # a stream that does not tell its length has what is asked for, until it ends
    if there < MIN_EXAMPLES or examples < MIN_EXAMPLES:
        raise DataError(
            f"CKA needs at least {MIN_EXAMPLES} examples, but {min(there, examples)} "
            f"were {'asked for' if examples < there else f'found in {source.name}'}."
        )
    if examples > there:
        logger.info("%s holds %d images; %d were asked for, all are used.", source.name, there, examples)
    if isinstance(source, Stream):
        indices = np.arange(min(examples, there))
    else:
        indices = np.random.default_rng(seed).permutation(there)[:examples]
    return Samples(source, indices, identities_sha256(source, indices))


def identities_sha256(source: ImageSource, indices: NDArray[np.int64]) -> str:
    """The hash of the identities of images, one a line, in order: that of the file which lists them."""
    digest = hashlib.sha256()
    for position, index in enumerate(indices):
        digest.update((b"\n" if position else b"") + name_bytes(quoted(source.identity(int(index)))))
    return digest.hexdigest()


def fingerprint(samples: Samples) -> str:
    """A hash, 16 hexadecimal digits, by which images are known again that have changed behind the same names.

    Of a folder it takes the sizes of all files and the bytes of the first hundred, in the order of the sample; of the
    two folders of paired images those of both. Of other images the pixels of the first hundred, of shards the names
    and sizes of their files, and of any other stream nothing. No time of a file is part of it.
    """
    source = samples.source
    if isinstance(source, Stream):
        return files_fingerprint([(file, file) for file in source.files], ())
    folders = [folder for folder in (source, samples.paired) if isinstance(folder, Folder)]
    if folders:
        files = ((folder.identity(i), folder.file(i)) for i in samples.indices.tolist() for folder in folders)
        return files_fingerprint(files, range(FINGERPRINTED * len(folders)))
    return pixels_fingerprint(_image_or_none(source, index) for index in samples.indices[:FINGERPRINTED].tolist())


def batch_count(examples: int, batch_size: int) -> int:
    """How many batches so many examples make; a last one of fewer than 4 is none."""
    whole, rest = divmod(examples, batch_size)
    return whole + (rest >= MIN_EXAMPLES)


def holds_tensors(samples: Samples) -> bool:
    """Whether the samples are tensors, which go to every network as they are, and not images."""
    source = samples.source
    try:
        first = next(iter(source), None) if isinstance(source, Stream) else source.image(int(samples.indices[0]))
        return isinstance(first, Tensor)
    except READ_ERRORS:
        return False  # the first batch will tell


def batches(  # noqa: PLR0913
    samples: Samples,
    transforms: Sequence[Transform],
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
    sides: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
    note: Callable[[int, Tensor], None] | None = None,
) -> Iterator[list[Tensor]]:
    """The images batch by batch: a list of one (n, c, h, w) tensor a transform, all of the same n images.

    A last batch of fewer than 4 is dropped.

    Args:
        samples: which images.
        transforms: what becomes of them.
        batch_size: images in a batch.
        workers: processes that read and transform them; 0 does it in this one.
        pin_memory: for a GPU.
        sides: for each transform, which image of a pair it is given; the first for all of them by default.
        numbers: of the batches that are wanted, ascending; all of them by default.
        note: called with the number of the first example of each batch, and the (n,) int64 hashes of its images.

    Raises:
        DataError: an image cannot be read; the message names it. Or a stream ends before it should.
    """
    prepare = _Prepare(transforms, [0] * len(transforms) if sides is None else sides)
    wanted = range(batch_count(len(samples), batch_size)) if numbers is None else numbers
    if not wanted:
        return
    source = samples.source
    options: dict[str, Any] = {"pin_memory": pin_memory, "collate_fn": _collate}
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
    """How many processes should decode images: none for the digits, which lie in memory; else a core less than all.

    Args:
        source: of the images.
        sharing: how many processes like this one share the machine.
    """
    return 0 if isinstance(source, Digits) else max(1, min(8, (cores() - 1) // sharing))


def _image_or_none(source: ImageSource, index: int) -> Image | Tensor | None:
    try:
        return source.image(index)
    except READ_ERRORS:
        return None  # the batch that it belongs to will tell


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
                images.append(source.image(index))
            except READ_ERRORS as error:
                return _unreadable(source, index, error)
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
        source, known = self._samples.source, len(self._samples)
        assert isinstance(source, Stream)
        worker = get_worker_info()
        wanted = self._by_worker[worker.id if worker is not None else 0]
        reads = source.reads()
        for index in range(min(known, (max(wanted) + 1) * self._batch_size)):
            try:
                read = next(reads)
                image = read() if index // self._batch_size in wanted else None
            except StopIteration:
                said = f", of the {len(source)} that it says it has" if len(source) else ""
                yield (
                    f"{source.name} must yield {known} images{said}, but ended after {index}. Ask for fewer with "
                    "--examples."
                )
                return
            except READ_ERRORS as error:
                yield _unreadable(source, index, error)
                return
            if image is not None:
                yield self._prepare([image], source, index)


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
            return f"{error} The image was {_place(source, index)}."
        except READ_ERRORS as error:
            return _unreadable(source, index, error)


def _unreadable(source: ImageSource, index: int, error: Exception) -> str:
    return unreadable(_place(source, index), error)


def _place(source: ImageSource, index: int) -> str:
    identity = source.identity(index)
    return os.path.join(source.name, identity) if isinstance(source, Folder) else identity


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
