"""Files of features from anywhere: read row by row, or named with what is wrong."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import cka_probe as cp
from cka_probe.errors import DataError, FeatureError, OutputError
from cka_probe.probing.feature_files import FeatureFile, mapped
from cka_probe.probing.stored_features import read_stored
from tests.toy_networks import offset_networks


def array(n: int = 50, d: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, d))


def header(text: str, data: bytes = bytes(64)) -> bytes:
    """A safetensors file with this header."""
    return len(text).to_bytes(8, "little") + text.encode() + data


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    """A safetensors file of two (2, 4) arrays at these offsets."""
    entry = '"{}":{{"dtype":"F32","shape":[2,4],"data_offsets":[{},{}]}}'
    return header("{" + ",".join(entry.format(name, *place) for name, place in (("a", first), ("b", second))) + "}")


def npy(text: str) -> bytes:
    """An npy file with this header."""
    line = f"{text:255}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + bytes(64)


def shaped(shape: str, dtype: str = "<f4") -> bytes:
    return npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.safetensors", two((0, 32), (16, 48)), "(invalid offset|InvalidOffset)"),
        ("x.safetensors", two((0, 32), (32, 60)), "(invalid shape, data type, or offset|TensorInvalidInfo)"),
        ("x.safetensors", two((0, 32), (0, 32)), "(invalid offset|InvalidOffset)"),
        ("x.safetensors", two((0, 32), (32, 96)), "damaged"),
        ("x.safetensors", two((0, 32), (32, 64))[:-1], "damaged"),
        ("x.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "(header too large|HeaderTooLarge)"),
        ("x.safetensors", header('{"a":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,64]}}'), ""),
        ("x.safetensors", header('{"a":{"dtype":"I64","shape":[2,4],"data_offsets":[0,64]}}'), "but are I64"),
        ("x.safetensors", b"", "damaged"),
        ("x.npy", shaped("(99999999999, 9999999999)"), ""),
        ("x.npy", shaped(f"({10**30}, 4)"), ""),
        ("x.npy", shaped("(-2, -8)"), "negative"),
        ("x.npy", shaped("(1000, 4)"), "length is greater"),
        ("x.npy", shaped("(2, 4)", "|O"), "Python objects"),
        ("x.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4L, '''"), "TokenError"),
        ("x.npy", npy("(" * 200), ""),
        ("x.npy", b"", ""),
        ("x.npz", b"PK\x03\x04", ""),
    ],
)  # fmt: skip
def test_a_file_with_an_odd_header_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must hold features .*cannot be read: .*{said}") as caught:
        cp.compare([tmp_path / name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 3), dtype="c8"),
        np.zeros((4, 3), dtype="U5"),
        np.zeros((4, 3), dtype=[("a", "f4"), ("b", "i4")]),
        np.zeros((4, 3), dtype="M8[s]"),
        np.zeros((), dtype="f4"),
    ],
    ids=lambda values: str(values.dtype),
)
def test_numbers_of_other_kinds_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(FeatureError, match="must be real numbers"):
        cp.compare([tmp_path / "x.npy"])


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    entry = '"a":{"dtype":"%s","shape":[2,%d],"data_offsets":[0,64]}'
    (tmp_path / "x.safetensors").write_bytes(header("{" + entry % ("F32", 8) + "," + entry % ("F64", 4) + "}"))
    with pytest.raises(DataError, match="'a' stands twice in its header"):
        mapped(tmp_path / "x.safetensors")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_with_damaged_bytes_is_named_or_unharmed(tmp_path: Path, save: Callable[..., None]) -> None:
    x, rng, path = np.float32(array()), np.random.default_rng(0), tmp_path / "z.npz"
    save(path, x=x)
    content = path.read_bytes()
    for _ in range(100):
        changed, start = bytearray(content), int(rng.integers(len(content)))
        changed[start : start + 30] = rng.bytes(len(changed[start : start + 30]))
        path.write_bytes(changed)
        found = _layers_or_message(path)
        if isinstance(found, str):
            assert "\n" not in found
        else:
            np.testing.assert_array_equal(next(iter(found.values())), x)


def _layers_or_message(path: Path) -> str | dict[str, np.ndarray]:
    try:
        return dict(read_stored(str(path))[0].layers)
    except (DataError, FeatureError) as error:
        return str(error)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} must hold features .*: it is a named pipe, not a regular file"):
        read_stored(str(tmp_path / name))


def test_features_of_any_float_are_read_in_any_order(tmp_path: Path) -> None:
    x = torch.tensor(array())
    layers = {"z": x, "b": x.float(), "m": x.half(), "a": x.bfloat16()}
    safetensors.torch.save_file({name: layer.clone() for name, layer in layers.items()}, tmp_path / "x.safetensors")
    rows, found = np.array([40, 3, 3, 17]), mapped(tmp_path / "x.safetensors")
    for name, layer in layers.items():
        expected = (layer.float() if name == "a" else layer).numpy()[rows]
        assert (found[name].shape, found[name][rows].dtype) == ((50, 6), expected.dtype)
        np.testing.assert_array_equal(found[name][rows], expected)
    similarity = cp.compare([tmp_path / "x.safetensors"], batch_size=10, seed=1)
    np.testing.assert_allclose(similarity.values, 1, atol=1e-4)  # bfloat16 has 8 bits
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, np.asfortranarray(x.numpy()), version=version)
        (stored,) = read_stored(str(tmp_path / "x.npy"))
        np.testing.assert_array_equal(stored.layers["features"][rows], x.numpy()[rows])


def test_layers_keep_the_order_of_the_file(tmp_path: Path) -> None:
    names = [f"blocks.{number}" for number in range(12)]
    FeatureFile(tmp_path / "x.safetensors", 4, dict.fromkeys(names, 2), {}).close()
    assert list(mapped(tmp_path / "x.safetensors")) == names


def test_a_damaged_record_of_features_is_named(tmp_path: Path) -> None:
    images = torch.rand(12, 3, 6, 6)
    cp.extract(offset_networks(), tmp_path / "whole", data=images, layers="all", batch_size=4)
    record = yaml.safe_load((tmp_path / "whole" / "run.yaml").read_text())
    result = record["result"]
    for number, change in enumerate((
        [1], None, {**result, "subjects": [3]}, {"subjects": []}, {**result, "data": 3}, {**result, "pool": None},
    )):  # fmt: skip
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        (copy / "run.yaml").write_text(yaml.safe_dump({**record, "result": change}))
        with pytest.raises(DataError, match=r"run\.yaml is not as cka-probe wrote it: result") as caught:
            cp.compare([copy])
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_when_features_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = FeatureFile(tmp_path / "x.safetensors", 4, {"a": 2}, {})
    file.write("a", 0, np.zeros((4, 2), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"x\.safetensors.*No space left on device.*Make room"):
            file.sync()
    file.close()
    monkeypatch.setattr(file, "_file", SimpleNamespace(close=full))
    with pytest.raises(OutputError, match="No space left on device"):
        file.close()
