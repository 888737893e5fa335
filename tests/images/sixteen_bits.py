"""Folders and shards of images with 16 bits a pixel."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

VALUES = {"a": 300, "b": 30000, "c": 65535}


def gray(value: int, big_endian: bool = False) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, dtype=">u2" if big_endian else "<u2"))


def write(root: Path, values: dict[str, int] = VALUES, suffix: str = "png") -> Path:
    """Four training and two validation images a class, all pixels of an image the same."""
    for part, count in (("train", 4), ("val", 2)):
        for name, value in values.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                gray(value, suffix == "big.tif").save(root / part / name / f"{index}.{suffix}")
    return root


def write_shard(folder: Path, values: dict[str, int]) -> Path:
    """Two images a value."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(2 * len(values)):
            file = io.BytesIO()
            gray(list(values.values())[number // 2]).save(file, "png")
            info = tarfile.TarInfo(f"{number:04}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    counts = {"num_samples": 2 * len(values), "shard_lengths": [2 * len(values)]}
    split = {"name": "validation", "filenames": ["0.tar"], **counts}
    (folder / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return folder
