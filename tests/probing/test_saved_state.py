"""A killed run goes on where it was, and ends as one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.errors import CheckpointError, SpecError
from cka_probe.runtime.folder.checkpoint import COMPARISON, load_checkpoint
from cka_probe.runtime.folder.run_folder import PRIVATE
from tests.toy_networks import Killed, killed_after, offset_networks, ragged_images

ASKED: dict[str, Any] = {
    "measures": ("cka", "cka:biased", "cka-rbf", "rsa", "energy"), "layers": "type:Conv2d,type:Linear",
    "batch_size": 8, "permutations": 3, "curve": True, "influence": 2,
}  # fmt: skip
QUICK = ["zoo:cnn", "--layers", "stages", "--examples", "64", "--batch-size", "8"]


def compare(**options: Any) -> dict[str, cp.Similarity]:
    found: dict[str, cp.Similarity] = cp.compare(offset_networks(), data=ragged_images(), **{**ASKED, **options})
    return found


@pytest.fixture(scope="module")
def whole() -> dict[str, cp.Similarity]:
    return compare()


def assert_equal(found: dict[str, cp.Similarity], expected: dict[str, cp.Similarity]) -> None:
    for name, similarity in expected.items():
        for part in ("values", "std_error", "null", "p_value", "p_value_max"):
            np.testing.assert_array_equal(getattr(found[name], part), getattr(similarity, part))
        one, other = found[name].curve, similarity.curve
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.values, other.values)
        assert found[name].influence == similarity.influence
        before, now = (replace(s.provenance, seconds=0) for s in (similarity, found[name]))
        assert now == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_was_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(
    tmp_path: Path, whole: dict[str, cp.Similarity]
) -> None:
    for batches in (1, 2, 2, 5, 9):
        killed_after(
            batches, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path, resume=True
        )  # fmt: skip
    seen: list[int] = []
    assert_equal(compare(checkpoint=tmp_path, resume=True, progress=lambda done, _: seen.append(done)), whole)
    assert seen == [77], "only the batch that was not done"
    assert_equal(compare(checkpoint=tmp_path, resume=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_where_the_last_save_is_lost_the_one_before_is_taken_and_said(
    tmp_path: Path, whole: dict[str, cp.Similarity], lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    killed_after(3, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    last = tmp_path / PRIVATE / "last.ckpt"
    if lost == "gone":
        last.unlink()
    else:
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 0xFF
        last.write_bytes(content)
    seen: list[int] = []
    assert_equal(compare(checkpoint=tmp_path, resume=True, progress=lambda done, _: seen.append(done)), whole)
    assert "going on from the checkpoint before it" in caplog.text
    assert seen[0] == 24


def test_saves_that_are_all_damaged_say_what_to_do(tmp_path: Path) -> None:
    killed_after(3, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    for path in (tmp_path / PRIVATE).glob("*.ckpt"):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="Start over with --overwrite"):
        compare(checkpoint=tmp_path, resume=True)


def test_features_that_are_lost_are_told(tmp_path: Path) -> None:
    killed_after(3, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    (tmp_path / PRIVATE / "features" / "features-1.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"first 24 images must be in .*features-1.bin"):
        compare(checkpoint=tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 16}, "batch_size was 8 and is 16"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"measures": ("cka",)}, "measures was .* and is .'cka'."),
        ({"permutations": 4}, "permutations was 3 and is 4"),
        ({"layers": "type:Linear"}, "layers was "),
        ({"examples": 70}, "examples was 77 and is 70"),
        ({"pool": "mean"}, "pool was None and is 'mean'"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    killed_after(2, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    with pytest.raises(SpecError, match=message):
        compare(**changed, checkpoint=tmp_path, resume=True)


def test_a_network_is_known_by_its_weights(tmp_path: Path) -> None:
    killed_after(2, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    networks = offset_networks()
    with torch.no_grad():
        next(networks["two"].parameters())[0, 0, 0, 0] += 1e-6
    with pytest.raises(SpecError, match="weights of two was '[0-9a-f]{16}'"):
        cp.compare(networks, data=ragged_images(), **ASKED, checkpoint=tmp_path, resume=True)


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(tmp_path: Path) -> None:
    killed_after(2, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path)
    other = ragged_images()
    other[:, 0, 0, 0] += 1e-3
    with pytest.raises(SpecError, match=r"The images have changed since the run was started.*--overwrite"):
        cp.compare(offset_networks(), data=other, **ASKED, checkpoint=tmp_path, resume=True)


def test_a_run_does_not_go_on_with_other_features_of_the_same_files(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(40, 3))
    options: dict[str, Any] = {"batch_size": 8, "checkpoint": tmp_path / "run"}
    np.save(tmp_path / "x.npy", features)
    killed_after(2, [tmp_path / "x.npy"], **options)
    np.save(tmp_path / "x.npy", features[::-1])
    with pytest.raises(SpecError, match="values of x was '[0-9a-f]{16}'"):
        cp.compare([tmp_path / "x.npy"], **options, resume=True)
    np.save(tmp_path / "x.npy", features)
    cp.compare([tmp_path / "x.npy"], **options, resume=True)


@pytest.mark.slow
def test_a_run_that_is_not_resumed_starts_anew(tmp_path: Path, whole: dict[str, cp.Similarity]) -> None:
    killed_after(5, offset_networks(), data=ragged_images(), **{**ASKED, "seed": 3}, checkpoint=tmp_path)
    seen: list[int] = []
    assert_equal(compare(checkpoint=tmp_path, progress=lambda done, _: seen.append(done)), whole)
    assert seen[0] == 8


def test_nothing_is_saved_before_it_is_time(tmp_path: Path) -> None:
    killed_after(5, offset_networks(), data=ragged_images(), **ASKED, checkpoint=tmp_path / "kept", minutes=5)
    assert not list((tmp_path / "kept" / PRIVATE).glob("*.ckpt"))


def test_an_interrupt_saves_what_is_there_unless_a_batch_is_half_added(tmp_path: Path) -> None:
    def interrupted(after: int) -> Any:
        def progress(done: int, _: int) -> None:
            if done > after:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        compare(checkpoint=tmp_path / "whole", progress=interrupted(16))
    seen: list[int] = []
    compare(checkpoint=tmp_path / "whole", resume=True, progress=lambda done, _: seen.append(done))
    assert seen[0] == 32

    from cka_probe.estimation.collected import Collected

    def broken(self: Collected, first: int) -> None:
        if first == 24:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collected, "update", broken)  # the measures before it have added their batch
        with pytest.raises(KeyboardInterrupt):
            compare(checkpoint=tmp_path / "half")
    assert not list((tmp_path / "half" / PRIVATE).glob("*.ckpt"))


def test_an_extraction_goes_on_with_its_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": ragged_images(), "layers": "all", "batch_size": 8}
    whole = cp.extract(offset_networks(), tmp_path / "whole", **options)

    def kill(done: int, _: int) -> None:
        if done > 40:
            raise Killed

    with pytest.raises(Killed):
        cp.extract(offset_networks(), tmp_path / "cut", **options, checkpoint_minutes=0, progress=kill)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [PRIVATE]
    seen: list[int] = []
    cut = cp.extract(
        offset_networks(), tmp_path / "cut", **options, resume=True, progress=lambda done, _: seen.append(done)
    )
    assert seen[0] == 48
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    for one, other in zip(whole, cut, strict=True):
        expected, found = safetensors.numpy.load_file(one), safetensors.numpy.load_file(other)
        for layer, features in expected.items():
            np.testing.assert_array_equal(found[layer], features)


# the command


@pytest.mark.full
def test_a_killed_command_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    """Killed by SIGKILL at random moments, of which some come before the first batch, and some after the last."""
    arguments = ["compare", *QUICK[:-1], "4", "--measures", "cka,cka-rbf"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    rng = random.Random(0)
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "cka_probe", *arguments, "--checkpoint-minutes", "0", "--out", str(out)]
    for _ in range(2):
        with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            process.stderr.readline()  # it is at work
            time.sleep(rng.uniform(0, 2))
            process.kill()
    assert main([*arguments, "--resume", "--out", str(out)]) == 0
    assert (out / "similarity.csv").read_bytes() == (tmp_path / "whole" / "similarity.csv").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.slow
def test_what_is_in_the_folder_decides_whether_a_run_starts_or_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    from cka_probe.runtime import terminal

    calls = iter(range(100))

    def interrupt_third(self: terminal.Progress, done: int, total: int) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Progress, "__call__", interrupt_third)
    assert main(["compare", *QUICK, "--out", out]) == 130
    assert f"Go on with: cka-probe compare {' '.join(QUICK)} --out {out} --resume" in capsys.readouterr().err
    assert main(["compare", *QUICK, "--out", out]) == 2
    assert "holds a run that is not finished. Add --resume to go on, or --overwrite" in capsys.readouterr().err
    assert main(["compare", *QUICK, "--seed", "1", "--resume", "--out", out]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert main(["compare", *QUICK, "--resume", "--out", out]) == 0
    assert "Resuming after batch 3" in capsys.readouterr().err
    assert not list((tmp_path / "out" / PRIVATE).glob("*.ckpt"))
    assert main(["compare", *QUICK, "--resume", "--workers", "0", "--out", out]) == 0
    assert "holds this run, finished" in capsys.readouterr().out
    assert main(["compare", *QUICK, "--seed", "1", "--resume", "--out", out]) == 2
    assert "holds a finished run. Name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_what_the_evaluation_or_the_pictures_might_lose_is_saved_and_the_seconds_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cka_probe.probing import saved_state as partial
    from cka_probe.reports import writing

    out, arguments = tmp_path / "out", ["compare", *QUICK, "--out", str(tmp_path / "out")]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(partial, "_MUCH_SECONDS", 0)
    with monkeypatch.context() as broken:
        broken.setattr(writing, "write_comparison", fail)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    state = load_checkpoint(out / PRIVATE, COMPARISON)
    assert state is not None
    assert state["batches"] == 8
    monkeypatch.setattr(partial.Checkpoints, "seconds_before", property(lambda _: 1e6, lambda *_: None), raising=False)
    assert main([*arguments, "--resume"]) == 0
    assert cp.Similarity.load(out / "similarity.npz").provenance.seconds > 1e6


@pytest.mark.full
def test_sigterm_is_an_interrupt(tmp_path: Path) -> None:
    command = ["compare", "zoo:cnn", "--batch-size", "4", "--resume", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "cka_probe", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it is at work
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert "Traceback" not in rest
