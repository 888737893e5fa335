"""Data that can only be read in their own order, and what several readers make of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.errors import DataError
from cka_probe.images.batches import Loading, batches
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.samples import sample
from cka_probe.images.sources.source import open_source
from cka_probe.images.sources.streams import Shards

LOOK = Preprocessing(size=(3, 16, 16), mean=(0, 0, 0), std=(1, 1, 1)).transform()
COUNTS = (7, 1, 12, 5)  # images a shard


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def write_shards(folder: Path, broken: int | None = None) -> Path:
    """25 images without labels in four shards, redder and redder, and their list as timm's reader has it."""
    pytest.importorskip("webdataset")
    number = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for _ in range(count):
                content = b"no image" if number == broken else png(10 * number)
                info = tarfile.TarInfo(f"{number:04}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                number += 1
    names = [f"shard-{shard}.tar" for shard in range(len(COUNTS))]
    split = {"name": "validation", "num_samples": number, "filenames": names, "shard_lengths": COUNTS}
    (folder / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return folder


def reds(samples: Any, **options: Any) -> list[list[int]]:
    """For each batch, the numbers of its images."""
    found = batches(samples, [LOOK], Loading(4, **options))
    return [(25.5 * batch[0][:, 0, 0, 0]).round().int().tolist() for batch in found]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on less than 3 cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_shards_are_read_in_their_order_whoever_reads_them(tmp_path: Path, workers: int) -> None:
    samples = sample(open_source("wds/any", data_dir=str(write_shards(tmp_path))), 23, seed=3)
    assert isinstance(samples.source, Shards)
    assert len(samples.source) == 25
    expected = [list(range(first, first + 4)) for first in (0, 4, 8, 12, 16)]
    assert reds(samples, workers=workers) == expected, "the last three are no batch"
    assert reds(samples, workers=workers, numbers=[1, 4]) == [expected[1], expected[4]]


def test_what_another_process_has_is_not_decoded(tmp_path: Path) -> None:
    """A broken image is told by who has its batch, and by no other."""
    samples = sample(open_source("wds/any", data_dir=str(write_shards(tmp_path, broken=9))), 24, seed=0)
    assert reds(samples, numbers=[0, 1, 3, 4, 5]) == [list(range(4 * n, 4 * n + 4)) for n in (0, 1, 3, 4, 5)]
    with pytest.raises(DataError, match="wds/any/validation/9 must be an image"):
        reds(samples)


def test_shards_may_be_named_by_a_pattern_and_their_number_left_open(tmp_path: Path) -> None:
    write_shards(tmp_path)
    source = open_source("wds/any", data_dir=str(tmp_path), split="shard-{0..2}.tar")
    assert len(source) == 0
    assert reds(sample(source, 20, 0))[-1] == [16, 17, 18, 19]
    with pytest.raises(DataError, match="must yield 24 images, but ended after 20. Ask for fewer"):
        reds(sample(source, 24, 0))


def test_a_shard_that_is_cut_short_is_told(tmp_path: Path) -> None:
    shard = write_shards(tmp_path) / "shard-2.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match="shards of wds/any/validation must be whole"):
        reds(sample(open_source("wds/any", data_dir=str(tmp_path)), 24, 0))


def test_a_comparison_on_shards_is_that_on_their_images(tmp_path: Path) -> None:
    write_shards(tmp_path)
    images = [Image.open(io.BytesIO(png(10 * number))) for number in range(25)]

    class Ordered(IterableDataset[Image.Image]):
        def __iter__(self) -> Any:
            return iter(images)

    options: dict[str, Any] = {"layers": "stages", "examples": 24, "batch_size": 8, "image_size": 16}
    found = cp.compare(["zoo:cnn"], data="wds/any", data_dir=str(tmp_path), **options)
    expected = cp.compare(["zoo:cnn"], data=Ordered(), **options)
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.provenance.data.images == 25
    assert expected.provenance.data.images is None


@pytest.mark.slow
def test_a_report_of_shards_of_unknown_number_does_without_it(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "_info.json").unlink()
    where = ["--data", "wds/any", "--data-dir", str(tmp_path), "--split", "shard-{0..1}.tar", "--image-size", "16"]
    sizes = ["--examples", "8", "--batch-size", "4", "--layers", "stages", "--workers", "0"]
    assert main(["compare", "zoo:cnn", *where, *sizes, "--out", str(tmp_path / "out")]) == 0
    assert "8 of wds/any" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_readers_that_deal_out_their_shards_to_processes_are_told_not_to() -> None:
    """Each process reads all, so that the order is that of one."""

    class Reader:
        dist_rank, dist_num_replicas = 1, 2

    class Dealing(IterableDataset[torch.Tensor]):
        reader = Reader()

        def __iter__(self) -> Any:
            mine = range(self.reader.dist_rank, 12, self.reader.dist_num_replicas)
            return (torch.full((1, 2, 2), float(number)) for number in mine)

    found = torch.cat([batch[0] for batch in batches(sample(open_source(Dealing()), 12, 0), [LOOK], Loading(4))])
    assert found[:, 0, 0, 0].tolist() == list(range(12))


def test_a_stream_is_read_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset[tuple[Image.Image, int]]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return ((Image.new("RGB", (8, 8), (index, 0, 0)), 0) for index in range(50))

        def __len__(self) -> int:
            return 50

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    samples = sample(open_source("hfids/stream", data_dir="anywhere"), 10, seed=3)
    assert samples.indices.tolist() == list(range(10))
    red = [batch[0][:, 0, 0, 0] for batch in batches(samples, [LOOK], Loading(5))]
    assert [len(part) for part in red] == [5, 5]
    assert torch.cat(red).diff().gt(0).all()


class Numbers(IterableDataset[tuple[Tensor, int]]):
    """A stream of (1, 2, 2) tensors that says it has 50."""

    def __init__(self, has: int = 50) -> None:
        self.has = has

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((torch.full((1, 2, 2), float(index)), 0) for index in range(self.has))

    def __len__(self) -> int:
        return 50


def test_an_iterable_dataset_of_one_s_own_is_a_stream() -> None:
    (batch,) = batches(sample(open_source(Numbers()), 6, 0), [LOOK], Loading(8))
    assert batch[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("has", [0, 3, 11])
def test_a_stream_that_ends_early_is_an_error(has: int) -> None:
    samples = sample(open_source(Numbers(has)), 12, 0)
    with pytest.raises(DataError, match=f"Numbers must yield 12 images.*ended after {has}"):
        list(batches(samples, [LOOK], Loading(4)))


def test_a_stream_that_breaks_names_the_image() -> None:
    class Broken(Numbers):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            yield torch.zeros(1, 2, 2), 0
            raise OSError("truncated")

    with pytest.raises(DataError, match="Broken/1 must be an image.*truncated"):
        list(batches(sample(open_source(Broken()), 8, 0), [LOOK], Loading(4)))


def test_a_stream_without_a_length_yields_what_is_asked_for_or_says_where_it_ended() -> None:
    class Unknown(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return (torch.full((1, 2, 2), float(index)) for index in range(9))

    (batch,) = batches(sample(open_source(Unknown()), 8, 0), [LOOK], Loading(8))
    assert batch[0][:, 0, 0, 0].tolist() == list(range(8))
    with pytest.raises(DataError, match="Unknown must yield 12 images, but ended after 9. Ask for fewer"):
        list(batches(sample(open_source(Unknown()), 12, 0), [LOOK], Loading(4)))
