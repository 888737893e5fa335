"""Checkpoints of runs and of networks: whole ones are loaded, all others named in one line."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cka_probe.errors import CheckpointError
from cka_probe.networks.checkpoints import load_checkpoint as load_weights
from cka_probe.networks.checkpoints import read_checkpoint
from cka_probe.runtime.folder.checkpoint import COMPARISON, FORMAT, LAST, PREVIOUS, load_checkpoint, require_whole

STATE: dict[str, Any] = {
    "format": FORMAT, "settings": {"seed": 0}, "seconds": 1.5, "batches": 2, "measures": {"cka": {}},
    "probes": [{"ways": {0: "x"}, "features": {"a": 3}}],
}  # fmt: skip


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for position in rng.integers(0, len(content), 3).tolist():
        changed[position] ^= int(rng.integers(1, 256))
    return bytes(changed)


# of runs


@pytest.mark.parametrize(
    "content",
    [
        [1, 2], 5, torch.zeros(3), {}, {"state_dict": {}}, {1: 2}, {"format": "1"}, {"format": True}, {"format": 1},
        {**STATE, "settings": []}, {**STATE, "seconds": "1"}, {**STATE, "batches": 2.5}, {**STATE, "probes": [3]},
        {**STATE, "measures": {"cka": 3}}, {**STATE, "seconds": float("nan")},
    ],
    ids=repr,
)  # fmt: skip
def test_a_whole_file_of_something_else_is_no_checkpoint_of_a_run(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: it is no checkpoint of") as caught:
        load_checkpoint(tmp_path, COMPARISON)
    assert "\n" not in str(caught.value)
    torch.save(STATE, tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path, COMPARISON) == STATE, "the one before it is whole"


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    torch.save({"format": FORMAT + 1, "settings": None}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=rf"newer cka-probe \(format {FORMAT + 1}\)"):
        load_checkpoint(tmp_path, COMPARISON)


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.write_bytes(b""), lambda path: path.symlink_to("/dev/zero")]
)
def test_what_stands_in_the_place_of_a_checkpoint_is_named(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r"No checkpoint of .*last\.ckpt: "):
        load_checkpoint(tmp_path, COMPARISON)


def test_a_checkpoint_with_flipped_bits_is_never_loaded_as_another(tmp_path: Path) -> None:
    torch.save({**STATE, "measures": {"cka": {"sums": torch.arange(50.0)}}}, tmp_path / LAST)
    content, rng = (tmp_path / LAST).read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        (tmp_path / LAST).write_bytes(damaged(content, rng))
        try:
            state = load_checkpoint(tmp_path, COMPARISON)
        except CheckpointError:
            continue
        assert state is not None
        assert torch.equal(state["measures"]["cka"]["sums"], torch.arange(50.0)), "the bits were of no meaning"


# of networks


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda w: w.to_sparse(), r"0\.weight \(sparse\)"),
        (lambda w: w.to("meta"), r"0\.weight \(without values, on the meta device\)"),
        (lambda w: w.to(torch.complex64), r"0\.weight \(complex\)"),
        (lambda w: w[0, 0], r"shapes differ \(1\): 0\.weight \(\) for \(3, 4\)"),
        (lambda w: "text", r"it lacks \(1\): 0\.weight"),
    ],
)
def test_a_tensor_that_is_no_weight_is_named(tmp_path: Path, changed: Callable[..., Any], said: str) -> None:
    state = network().state_dict()
    torch.save({**state, "0.weight": changed(state["0.weight"]), "epoch": 3}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(network(), tmp_path / "net.pth")
    assert "net.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [[1], 5, torch.zeros(3), {"state_dict": 5}, {"state_dict": None}, {7: torch.zeros(2)}], ids=repr
)
def test_what_holds_no_weights_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth must hold a state dict of tensors"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_either_kind_is_loaded(tmp_path: Path, zipped: bool) -> None:
    torch.save(network().state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    assert load_weights(network(), tmp_path / "net.pth").startswith("net.pth, sha256 ")


def test_weights_whose_checksums_disagree_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"0.weight": torch.rand(100, 100)}, path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + bytes(255 - value for value in content[middle : middle + 9]) + content[middle + 9 :]
    )
    assert torch.load(path, weights_only=True), "PyTorch reads it"
    with pytest.raises(CheckpointError, match=r"net\.pth cannot be read: its part net/data/0 is damaged\."):
        read_checkpoint(path)


def test_weights_that_were_saved_without_checksums_are_loaded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("a", b"")
    require_whole(tmp_path / "net.pth")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network().state_dict(), tmp_path / "net.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert load_weights(network(), tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.mkdir, "it is a folder"),
        (os.mkfifo, "it is something else"),
        (lambda path: path.symlink_to("/dev/zero"), "it is something else"),
        (lambda path: path.symlink_to(path), "there is none"),
        (lambda path: path.write_bytes(b""), "cannot be read: EOFError"),
        (lambda path: path.write_text("weights\n"), "cannot be read: "),
        (lambda path: path.write_text("zz"), "cannot be read: it is no file that"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(50)), "cannot be read: BadZipFile"),
    ],
)
def test_what_stands_in_the_place_of_weights_is_named(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    make(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=rf"net\.pth .*{said}"):
        read_checkpoint(tmp_path / "net.pth")
