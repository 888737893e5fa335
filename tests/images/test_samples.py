"""Images come in a fixed, seeded order, and are known again when they have changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from cka_probe.errors import DataError
from cka_probe.images.samples import fingerprint, holds_tensors, sample
from cka_probe.images.sources.source import open_source


class Numbers(IterableDataset[tuple[Tensor, int]]):
    """A stream of (1, 2, 2) tensors that says it has 50."""

    def __init__(self, has: int = 50) -> None:
        self.has = has

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((torch.full((1, 2, 2), float(index)), 0) for index in range(self.has))

    def __len__(self) -> int:
        return 50


def test_a_sample_is_seeded_and_its_hash_tells_the_images_and_their_order(image_folder: Path) -> None:
    source = open_source(image_folder)
    first, again, other = sample(source, 8, 0), sample(source, 8, 0), sample(source, 8, 1)
    assert first.indices.tolist() == again.indices.tolist()
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert len(set(first.indices.tolist())) == 8
    assert sample(source, 6, 0).indices.tolist() == first.indices[:6].tolist(), "fewer examples are the first of more"


def test_too_few_examples_are_refused_and_more_than_there_are_is_told(
    image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(image_folder)
    with pytest.raises(DataError, match="at least 4 examples, but 3 were asked for"):
        sample(source, 3, 0)
    with caplog.at_level("INFO", "cka_probe"):
        assert len(sample(source, 100, 0)) == 12
    assert "All 12 images of" in caplog.text
    with pytest.raises(DataError, match="but 3 were found in"):
        sample(open_source(TensorDataset(torch.zeros(3, 3, 8, 8))), 100, 0)


def test_samples_know_whether_they_are_tensors(image_folder: Path) -> None:
    for data, expected in ((image_folder, False), (torch.zeros(5, 1, 2, 2), True), (Numbers(), True)):
        assert holds_tensors(sample(open_source(data), 5, 0)) is expected


def test_images_that_change_behind_the_same_names_have_another_fingerprint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        for index in range(120):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{index:03}.bmp")

    def found(seed: int = 0, paired: bool = True) -> str:
        samples = sample(open_source(tmp_path / "one"), 200, seed)
        return fingerprint(replace(samples, paired=open_source(tmp_path / "two")) if paired else samples)

    whole = found()
    assert re.fullmatch("[0-9a-f]{16}", whole)
    order = sample(open_source(tmp_path / "one"), 200, 0).indices
    early, late = (f"{order[place]:03}.bmp" for place in (99, 100))
    for side, name, change, noticed in (
        ("one", early, b"\1", True),  # the same size, other bytes
        ("two", early, b"\1", True),
        ("one", late, b"\1", False),  # beyond the first hundred the size alone is looked at
        ("one", late, b"\1\1", True),
        ("two", late, b"\1\1", True),
    ):
        path = tmp_path / side / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + change)
        assert (found() != whole) is noticed, (side, name, change)
        path.write_bytes(before)
    os.utime(tmp_path / "one" / early, (0, 0))
    assert found() == whole, "no time is part of it"
    assert found(seed=1) != whole
    assert found(paired=False) != whole


def test_images_of_other_sources_are_known_by_their_first_hundred() -> None:
    images = torch.rand(120, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    samples = sample(open_source(TensorDataset(images)), 120, 0)
    whole = fingerprint(samples)
    for place, noticed in ((99, True), (100, False)):
        changed = images.clone()
        changed[samples.indices[place]] += 1
        assert (fingerprint(sample(open_source(TensorDataset(changed)), 120, 0)) != whole) is noticed
    digits_found = [fingerprint(sample(open_source("digits"), 8, seed)) for seed in (0, 0, 1)]
    assert digits_found[0] == digits_found[1] != digits_found[2]
    assert fingerprint(sample(open_source(Numbers()), 8, 0)), "a stream is not read"
