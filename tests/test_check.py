"""The built-in check: it passes here, and it fails where something is wrong."""

from __future__ import annotations

import pytest

from cka_probe import check
from cka_probe.cli.main import main
from cka_probe.measures.catalogue import about


@pytest.mark.slow
def test_the_check_passes_and_tells_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    for name in ("cka", "rsa", "mutual-knn", "energy"):
        assert f"identical views, {name} " in told
        assert f"shuffled pairs, {name} " in told
        assert f"one network twice, on digits, {name} " in told
    assert "FAIL" not in told


def test_a_check_that_fails_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [check.Check("wrong", 1.0, 0.5, 1e-6), check.Check("undefined", 0.0, float("nan"), 1e-6)]
    monkeypatch.setattr(check, "run_checks", lambda **_: iter(wrong))
    assert main(["check"]) == 1
    assert "2 failed" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_controls_hold_in_other_dtypes(dtype: check.Dtype) -> None:
    import torch

    found = list(check._controls(torch.device("cpu"), dtype))
    assert all(one.passed for one in found), [one for one in found if not one.passed]


def test_a_device_that_is_not_there_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


def test_a_distance_is_0_and_a_similarity_1_for_identical_layers() -> None:
    assert about("mmd").identical == 0
    assert about("rsa").identical == 1
    assert about("somebody's own").identical == 1
