"""Images that can only be read in their own order: shards, Hub streams, iterable datasets."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.errors import DataError
from cka_probe.images.sources.bit_depth import as_mode, in_8_bits
from cka_probe.images.sources.files import READ_ERRORS, read_image
from cka_probe.runtime.files import reason, require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

Read = Callable[[], "Image | Tensor"]


class Stream:
    """An iterable dataset of images, or of tuples that start with one. Labels are not read.

    Args:
        dataset: the images.
        name: of the data.
        mode: of Pillow, to convert images to; left as they are where empty.
        full_scale: as for `cka_probe.images.sources.bit_depth.in_8_bits`.

    Attributes:
        name: of the data.
        files: paths of its files, where they are known.
        decodes_late: whether an image that is passed over costs no decoding, so that several workers can share them.
    """

    classes = None
    in_memory = False
    decodes_late = False

    def __init__(self, dataset: Any, name: str, *, mode: str = "", full_scale: float | None = None) -> None:
        self._dataset = dataset
        self._mode = mode
        self.name = name
        self.full_scale = full_scale
        self.files: list[str] = []
        reader = getattr(dataset, "reader", None)
        if reader is not None and hasattr(reader, "dist_num_replicas"):
            # Within torchrun they would deal out their shards, and no two numbers of processes see the same order.
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def __len__(self) -> int:
        """How many images it says it has; 0 where it is unknown, as timm's readers have it."""
        return len(self._dataset) if hasattr(self._dataset, "__len__") else 0

    def __iter__(self) -> Iterator[Image | Tensor]:
        for read in self.reads():
            yield read()

    def reads(self) -> Iterator[Read]:
        """For each image what reads it, so that it can be passed over."""
        for index, item in enumerate(self._dataset):
            yield partial(_of_item, item, self.identity(index), self._mode, self.full_scale)

    def reads_of(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, Read]]:
        """The number of each of some images, ascending, and what reads it.

        Raises:
            DataError: the stream ends before, or cannot be read on; the message names the image.
        """
        reads, following = self.reads(), 0
        for count, index in enumerate(indices.tolist()):
            try:
                read = next(islice(reads, index - following, None))
            except StopIteration:
                said = f", of the {len(self)} that it says it has" if len(self) else ""
                raise DataError(
                    f"{self.name} must yield {len(indices)} images{said}, but ended after {count}. Ask for fewer with "
                    "--examples."
                ) from None
            except READ_ERRORS as error:
                why = reason(error).rstrip(".")
                raise DataError(f"{self.place(index)} must be an image, but ends the stream: {why}.") from error
            following = index + 1
            yield index, read

    def read(self, index: int) -> tuple[Image | Tensor, int | None]:
        """Refused: the images come in sequence."""
        raise DataError(f"{self.name} can only be read in sequence.")

    def identity(self, index: int) -> str:
        """The number of an image."""
        return f"{self.name}/{index}"

    def place(self, index: int) -> str:
        """What messages call an image."""
        return self.identity(index)


class Shards(Stream):
    """WebDataset shards, whose list timm's reader makes. Labels are not asked for, and broken images are not left out.

    The reader's own pipeline decodes every image, and passes over those that cannot be decoded or have no label; which
    images a batch holds would depend on that.
    """

    decodes_late = True

    def __init__(self, dataset: Any, name: str, *, full_scale: float | None = None) -> None:
        super().__init__(dataset, name, mode=dataset.reader.input_img_mode or "", full_scale=full_scale)
        self.files = [f"{dataset.reader.root}/{file}" for file in dataset.reader.split_info.filenames]

    def reads(self) -> Iterator[Read]:
        """For each image what decodes it."""
        for data in self._contents():
            yield partial(_decoded, data, self._mode, self.full_scale)

    def original(self, index: int) -> Image:
        """An image as it is stored, whatever its depth; all before it are passed over."""
        with closing(self._contents()) as contents:
            return read_image(io.BytesIO(next(islice(contents, index, None))))

    def _contents(self) -> Generator[bytes, None, None]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        reader = self._dataset.reader
        keys = reader.input_key.split(";")
        samples = group_by_keys(tar_file_expander(_opened(self.files)))
        try:
            for shard in filter(os.path.exists, self.files):
                require_regular(shard)
            for sample in samples:
                data = next((sample[key] for key in keys if key in sample), None)
                if data is not None:
                    yield data
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise DataError(f"The shards of {self.name} must be whole tar files, but: {reason(error)}") from error


def _opened(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Shards as WebDataset's functions take them, each closed before the next, which they leave to the collector."""
    from webdataset.tariterators import url_opener

    for source in url_opener({"url": shard} for shard in shards):
        try:
            yield source
        finally:
            source["stream"].close()


def as_image(item: Any, identity: str) -> Image | Tensor:
    """The image of an item, which is one, or a tuple that starts with one.

    Raises:
        DataError: it is something else.
    """
    from PIL.Image import Image as PILImage

    image = item[0] if isinstance(item, (tuple, list)) else item
    if isinstance(image, PILImage) or (isinstance(image, Tensor) and image.ndim == 3):
        return image
    shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
    raise DataError(
        f"{identity} must be a PIL image or a (c, h, w) tensor, or a tuple that starts with one, but is "
        f"{type(image).__name__}{shape}."
    )


def _of_item(item: Any, identity: str, mode: str, full_scale: float | None) -> Image | Tensor:
    image = as_image(item, identity)
    if not isinstance(image, Tensor):
        image.load()  # a dataset may leave it to the one who looks at the pixels
    return _finished(image, mode, full_scale)


def _finished(image: Image | Tensor, mode: str, full_scale: float | None) -> Image | Tensor:
    if isinstance(image, Tensor):
        return image
    image = in_8_bits(image, full_scale)
    return as_mode(image, mode) if mode else image


def _decoded(data: bytes, mode: str, full_scale: float | None) -> Image | Tensor:
    return _finished(read_image(io.BytesIO(data)), mode, full_scale)
