"""Images for training without labels: any folder will do, and class folders are still known for scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cka_probe.errors import DataError, SpecError
from cka_probe.images.parts import Parts, fingerprint, open_parts


def opened(root: Path | str) -> Parts:
    return open_parts(root, validation=0.25, memory=1, labels=False)


def fill(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / path)
    return root


@pytest.mark.parametrize(
    ("paths", "train"),
    [
        (("a.png", "b.png"), ["a.png", "b.png"]),
        (("a.png", "x/b.png", "y/c.png"), ["a.png", "x/b.png", "y/c.png"]),
        (("x/a.png", "x/b.png"), ["x/a.png", "x/b.png"]),
        (("train/a.png", "train/b.png", "val/c.png"), ["a.png", "b.png"]),
    ],
    ids=["plain", "some below", "one folder", "a plain training part"],
)
def test_a_folder_without_classes_is_all_for_training(tmp_path: Path, paths: tuple[str, ...], train: list[str]) -> None:
    parts = opened(fill(tmp_path, *paths))
    assert [parts.train.identity(index) for index in range(len(parts.train))] == train
    assert (parts.classes, parts.validation, len(parts.test)) == ((), None, 0)
    assert [parts.train.read(index)[1] for index in range(len(train))] == [0] * len(train)
    assert parts.probed is parts.train
    before = fingerprint(parts.train)
    fill(tmp_path, paths[0].replace("a.png", "new.png"))
    assert fingerprint(opened(tmp_path).train) != before


def test_class_folders_are_divided_as_with_labels(colours: Path) -> None:
    with_labels = open_parts(colours, validation=0.25, memory=1)
    parts = opened(colours)
    assert parts.counts == with_labels.counts
    assert parts.classes == with_labels.classes
    assert fingerprint(parts.train) == fingerprint(with_labels.train)


def test_what_holds_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold images"):
        opened(tmp_path)
    with pytest.raises(SpecError, match="is none of these"):
        opened(tmp_path / "missing")
    with pytest.raises(DataError, match="class"):
        open_parts(fill(tmp_path, "a.png"))


def test_shards_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-0000.tar", "w") as shard:
        for suffix, content in (("png", None), ("cls", b"0")):
            buffer = io.BytesIO(content or b"")
            if content is None:
                Image.new("RGB", (8, 8)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"0.{suffix}")
            member.size = len(buffer.getvalue())
            buffer.seek(0)
            shard.addfile(member, buffer)
    (tmp_path / "_info.json").write_text(
        '{"name": "x", "splits": {"train": {"name": "train", "filenames": ["train-0000.tar"], "shard_lengths": [1],'
        ' "num_samples": 1}}}'
    )
    with pytest.raises(SpecError, match="can only be read in sequence"):
        open_parts("wds/x", data_dir=str(tmp_path), labels=False)
