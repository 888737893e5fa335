"""Hashes by which images are known again: of their pixels, or of the names, sizes and bytes of their files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cka_probe.runtime.files import require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

FINGERPRINTED = 100
"""Of so many images the bytes are part of a fingerprint; of the others the sizes are."""


def image_digest(images: Iterable[Image | Tensor]) -> int:
    """A hash of 64 bits of the pixels of one image, or of the two of a pair."""
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        _add_pixels(digest, image)
    return int.from_bytes(digest.digest(), "little", signed=True)


def files_fingerprint(paths: Iterable[tuple[str, str | Path]], bytes_of: Collection[int]) -> str:
    """A hash, 16 hexadecimal digits, of names and sizes of files, and of the bytes of some; never of their times.

    Args:
        paths: name and path of each.
        bytes_of: positions of those whose bytes count too.
    """
    digest = hashlib.sha256()
    for position, (name, path) in enumerate(paths):
        try:
            size = os.stat(path).st_size
            require_regular(path)
            content = Path(path).read_bytes() if position in bytes_of else b""
        except OSError as error:  # reading the image will show it
            size, content = -1, type(error).__name__.encode()
        digest.update(f"{name!a} {size}\n".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def pixels_fingerprint(images: Iterable[Image | Tensor | None]) -> str:
    """A hash, 16 hexadecimal digits, of the pixels of images; None for one that cannot be read."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(b"\n")
        if image is not None:
            _add_pixels(digest, image)
    return digest.hexdigest()[:16]


def _add_pixels(digest: Any, image: Image | Tensor) -> None:
    if isinstance(image, Tensor):
        digest.update(f"{image.dtype} {tuple(image.shape)}".encode())
        digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return
    palette = image.palette.tobytes() if image.palette is not None else b""
    digest.update(f"{image.mode} {image.size}".encode() + palette)
    digest.update(image.tobytes())
