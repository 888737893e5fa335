"""Several processes find what one finds, write once, and end together."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import cka_probe as cp
from cka_probe.errors import SpecError
from cka_probe.measures.catalogue import MEASURES
from cka_probe.runtime.world import joined
from tests.folders import files_below
from tests.toy_networks import killed_after, offset_networks, ragged_images

ASKED: dict[str, Any] = {
    "measures": (*(name for name in MEASURES if name not in ("mantel", "mutual-knn")), "mantel:3", "mutual-knn:3",
                 "cka:biased", "cka-rbf:0.4"),
    "layers": "type:Conv2d,type:Linear", "batch_size": 8, "permutations": 3, "curve": True, "influence": 2,
}  # fmt: skip

# Of every process a line, so that a result that only rank 0 has would be seen.
PROGRAM = """
import sys
import cka_probe as cp
from cka_probe.runtime.world import joined
from tests.toy_networks import offset_networks, ragged_images
from tests.runtime.test_world import ASKED

out = sys.argv[1]
with joined("cpu") as world:
    common = {"data": ragged_images(), "world": world}
    fresh = cp.compare(offset_networks(), **common, **ASKED)
    resumed = cp.compare(offset_networks(), **common, **ASKED, checkpoint=f"{out}/begun", resume=True)
    for which, results in (("fresh", fresh), ("resumed", resumed)):
        for name, similarity in results.items():
            similarity.save(f"{out}/{which}.{name}.{world.rank}.npz")
    cp.extract(offset_networks(), f"{out}/features", **common, layers="all", batch_size=8)
"""


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def alone() -> dict[str, cp.Similarity]:
    return cp.compare(offset_networks(), data=ragged_images(), **ASKED)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_find_together_what_one_finds_also_after_a_killed_run(
    tmp_path: Path, alone: dict[str, cp.Similarity], processes: int
) -> None:
    """77 images in ten batches, the last of 5: neither two nor three processes have as many batches each."""
    killed_after(4, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path / "begun")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = torchrun(processes, str(tmp_path / "program.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, expected in alone.items():
        for which in ("fresh", "resumed"):
            for rank in range(processes):
                found = cp.Similarity.load(tmp_path / f"{which}.{name}.{rank}.npz")
                np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-9)
                np.testing.assert_allclose(found.null, expected.null, rtol=0, atol=1e-9)
                # A root of differences of sums.
                np.testing.assert_allclose(found.std_error, expected.std_error, rtol=0, atol=1e-7)
                np.testing.assert_array_equal(found.p_value, expected.p_value)
                assert [one.example for one in found.influence] == [one.example for one in expected.influence]
                assert found.curve is not None
                assert expected.curve is not None
                np.testing.assert_array_equal(found.curve.examples, expected.curve.examples)
                np.testing.assert_allclose(found.curve.values, expected.curve.values, rtol=0, atol=1e-9)
                assert found.provenance.data == expected.provenance.data
    cp.extract(offset_networks(), tmp_path / "one", data=ragged_images(), layers="all", batch_size=8)
    assert {path.name for path in (tmp_path / "features").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    for path in (tmp_path / "one").glob("*.safetensors"):
        for layer, features in safetensors.numpy.load_file(path).items():
            np.testing.assert_array_equal(
                safetensors.numpy.load_file(tmp_path / "features" / path.name)[layer], features
            )


@pytest.mark.full
def test_an_error_of_one_process_ends_all_with_one_message_and_nothing_written(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(24):
        Image.new("RGB", (32, 32), (10 * index, 0, 0)).save(folder / f"{index:02}.png")
    last = np.random.default_rng(0).permutation(24)[20]  # in the sixth batch of four, the third of the second process
    (folder / f"{last:02}.png").write_bytes(b"no image")
    done = torchrun(
        2, "-m", "cka_probe", "compare", "zoo:cnn", "--data", str(folder), "--batch-size", "4", "--workers", "0",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 1  # torchrun's own, whatever those of its processes are
    assert done.stderr.count(f"{last:02}.png must be an image") == 1
    assert "exitcode  : 2" in done.stderr
    assert files_below(tmp_path / "out") == []


@pytest.fixture
def alone_here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of torchrun or of Slurm is set."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    return monkeypatch


def entered(variables: dict[str, str], setting: pytest.MonkeyPatch) -> int:
    for name, value in variables.items():
        setting.setenv(name, value)
    with joined("cpu") as world:
        return world.size


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_an_allocation_without_srun_and_a_world_of_one_are_one_process(
    variables: dict[str, str], alone_here: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cka_probe"):
        assert entered(variables, alone_here) == 1
    assert ("Slurm allocated 4 tasks" in caplog.text) == (variables.get("SLURM_NTASKS") == "4")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "one of 2 processes, which need MASTER_ADDR, MASTER_PORT, RANK to meet"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "need MASTER_ADDR, MASTER_PORT to meet"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, but is 'two'"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, "srun --ntasks=1"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "must be below the 2 processes of its run, but is 2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"},
            "could not meet at no.such.host.invalid",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "MASTER_PORT must be a whole number",
        ),
    ],
)
def test_processes_that_cannot_find_each_other_say_what_is_missing(
    variables: dict[str, str], said: str, alone_here: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match=said):
        entered(variables, alone_here)
