"""Images of a source in a fixed, seeded order."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.errors import DataError
from cka_probe.images.broken import BrokenImage, Search, describe_broken, readable_indices
from cka_probe.images.fingerprints import FINGERPRINTED, files_fingerprint, pixels_fingerprint
from cka_probe.images.sources.files import READ_ERRORS
from cka_probe.images.sources.folder import Folder
from cka_probe.images.sources.source import ImageSource
from cka_probe.images.sources.streams import Stream
from cka_probe.images.sources.subset import origin
from cka_probe.runtime.names import name_bytes, quoted
from cka_probe.runtime.ranges import MIN_EXAMPLES

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Samples:
    """Chosen images in a fixed order.

    Attributes:
        source: where they come from.
        indices: which, in order; (n,) int64.
        sha256: of their identities (paths or numbers, not pixels), in order: two runs on the same data with the same
            hash saw the same images.
        paired: where the second image of each pair comes from, by the same indices; None where there are no pairs.
        broken: images that are left out, as they cannot be read.
    """

    source: ImageSource
    indices: NDArray[np.int64]
    sha256: str
    paired: ImageSource | None = None
    broken: tuple[BrokenImage, ...] = ()

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
        there = examples  # a stream of unknown length has what is asked for, until it ends
    if there < MIN_EXAMPLES or examples < MIN_EXAMPLES:
        raise DataError(
            f"CKA needs at least {MIN_EXAMPLES} examples, but {min(there, examples)} "
            f"were {'asked for' if examples < there else f'found in {source.name}'}."
        )
    if examples > there:
        logger.info("All %d images of %s are used (--examples is %d).", there, source.name, examples)
    if isinstance(source, Stream):
        indices = np.arange(min(examples, there))
    else:
        indices = np.random.default_rng(seed).permutation(there)[:examples]
    return Samples(source, indices, identities_sha256(source, indices))


def without_broken(samples: Samples, search: Search) -> Samples:
    """The samples without those that cannot be read; of pairs, without those of which one image cannot be read.

    Args:
        samples: which images.
        search: finds the broken ones.

    Raises:
        DataError: fewer than 4 are left.
    """
    sources = [source for source in (samples.source, samples.paired) if source is not None]
    broken = search(sources, samples.indices)
    indices = readable_indices(samples.indices, broken)
    if len(indices) < MIN_EXAMPLES:
        raise DataError(
            f"CKA needs at least {MIN_EXAMPLES} examples, but {len(indices)} are left: {describe_broken(broken)}."
        )
    return replace(samples, indices=indices, sha256=identities_sha256(samples.source, indices), broken=broken)


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
    source, indices = origin(samples.source, samples.indices)
    if isinstance(source, Stream):
        return files_fingerprint([(file, file) for file in source.files], ())
    folders = [folder for folder in (source, samples.paired) if isinstance(folder, Folder)]
    if folders:
        files = ((folder.identity(i), folder.file(i)) for i in indices.tolist() for folder in folders)
        return files_fingerprint(files, range(FINGERPRINTED * len(folders)))
    return pixels_fingerprint(_image_or_none(source, index) for index in indices[:FINGERPRINTED].tolist())


def holds_tensors(samples: Samples) -> bool:
    """Whether the samples are tensors, which go to every network as they are, and not images."""
    source = samples.source
    try:
        first = next(iter(source), None) if isinstance(source, Stream) else source.read(int(samples.indices[0]))[0]
        return isinstance(first, Tensor)
    except READ_ERRORS:
        return False  # the first batch will show it


def _image_or_none(source: ImageSource, index: int) -> Image | Tensor | None:
    try:
        return source.read(index)[0]
    except READ_ERRORS:
        return None  # the batch that it belongs to will show it
