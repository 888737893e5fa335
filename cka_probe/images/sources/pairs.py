"""Two folders of paired images: which are partners, and what the two are called."""

from __future__ import annotations

import os
from pathlib import Path

from cka_probe.errors import DataError, SpecError
from cka_probe.images.sources.folder import Folder, split_folder
from cka_probe.images.sources.paths import Paths
from cka_probe.images.sources.source import ImageSource, folder_path

_NAMED = 3


def paired_folder(first: ImageSource, spec: str | Path, *, split: str | None = None) -> Folder:
    """The partners of a folder's images, found in another folder, in the order of the first's.

    Two images are partners if their paths below their folders are the same, except for the suffix.

    Args:
        first: the folder of the first images.
        spec: the other folder, with or without ``folder:`` before it.
        split: as for `open_source`, for both alike.

    Raises:
        SpecError: one of the two is no folder.
        DataError: an image of either has no partner, or two of one folder have the same path except for the suffix.
    """
    _, text = folder_path(str(spec))
    if not isinstance(first, Folder):
        raise SpecError(f"Paired images must lie in two folders, but the first are those of {first.name}.")
    if not os.path.isdir(text):
        raise SpecError(f"Paired images must lie in two folders, but {text!r} is not one.")
    second = Folder(split_folder(Path(text), split), full_scale=first.full_scale)
    own, other = _by_stem(first), _by_stem(second)
    alone = [
        (folder, [path for stem, path in these.items() if stem not in those], len(these))
        for folder, these, those in ((first, own, other), (second, other, own))
    ]
    lacking = [
        f"{len(paths)} of the {count} images of {folder.name} have none ({', '.join(paths[:_NAMED])}"
        f"{', …' if len(paths) > _NAMED else ''})"
        for folder, paths, count in alone
        if paths
    ]
    if lacking:
        raise DataError(
            f"Each image must have a partner in the other folder, by its path, but {' and '.join(lacking)}."
        )
    second.paths = Paths(other[stem] for stem in own)
    return second


def pair_names(first: str | Path, second: str | Path) -> tuple[str, str]:
    """What two folders are called: their own names or, where these are the same, the parts of their paths that differ.

    >>> pair_names("scenes/human", "scenes/cat"), pair_names("human/frames", "folder:cat/frames")
    (('human', 'cat'), ('human/frames', 'cat/frames'))
    """
    paths = [os.path.abspath(folder_path(str(spec))[1]) for spec in (first, second)]
    one, other = (os.path.basename(path) for path in paths)
    if paths[0] == paths[1]:
        return one, f"{other} (paired)"
    if one == other:
        shared = os.path.commonpath(paths)
        one, other = (os.path.relpath(path, shared) for path in paths)
    return one, other


def _by_stem(folder: Folder) -> dict[str, str]:
    """Path without its suffix -> path, in the order of the folder."""
    stems: dict[str, str] = {}
    for path in folder.paths:
        stem = os.path.splitext(path)[0]
        if stem in stems:
            raise DataError(
                f"Partners are found by their path without its suffix, but {folder.name} has both {stems[stem]} and "
                f"{path}. Remove one of them."
            )
        stems[stem] = path
    return stems
