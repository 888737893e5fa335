"""The subcommands distill and evaluate: presets, messages, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from cka_probe.cli.distill import parse_distill
from cka_probe.cli.main import main
from cka_probe.distill.config import Training
from cka_probe.distill.config_checks import check_training
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.rkd import RKD
from cka_probe.distill.recipes import recipe
from cka_probe.distill.training.resuming import resumed_config
from cka_probe.errors import SpecError
from tests.distill.conftest import spec
from tests.folders import files_below

RECIPES = ("cifar-cnn", "cifar-token", "imagenet-cnn", "imagenet-token", "digits")


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # tyro's own errors
        return int(stop.code or 0)


def quick(colours: Path, out: Path, *more: str) -> list[str]:
    base = ["--student", spec("tiny_vit"), "--teacher", spec("teacher"), "--data", str(colours), "--epochs", "1"]
    rest = ["--batch-size", "12", "--workers", "0", "--device", "cpu", "--probe-examples", "32"]
    return ["distill", *base, *rest, "--out", str(out), *more]


def test_flags_overrule_config_which_overrules_recipe(tmp_path: Path) -> None:
    record = tmp_path / "run.yaml"
    record.write_text(yaml.safe_dump({"options": {"student": "zoo:vit", "lr": 0.25, "gamma": [1.0, 2.0]}}))
    arguments = ["--out", "x", "--recipe", "cifar-token", "--config", str(record), "--mixup", "0.5"]
    parsed = parse_distill(arguments).training
    assert (parsed.student, parsed.lr, parsed.method.gamma) == ("zoo:vit", 0.25, (1.0, 2.0))
    assert (parsed.mixup, parsed.cutmix, parsed.epochs) == (0.5, 1.0, 300)


def test_options_of_other_methods_in_a_record_are_passed_over(tmp_path: Path) -> None:
    """A run.yaml of before holds the options of all methods, None where a method's own default was meant."""
    record = tmp_path / "run.yaml"
    options = {"student": "zoo:vit", "method": "rkd", "gamma": [1.0, 2.0], "stages": "all", "feature_weight": None}
    record.write_text(yaml.safe_dump({"options": options}))
    assert parse_distill(["--out", "x", "--config", str(record)]).training.method == RKD()
    assert parse_distill(["--out", "x", "--config", str(record), "--feature-weight", "3"]).training.method == RKD(
        feature_weight=3.0
    )
    assert parse_distill(["--out", "x", "--config", str(record), "--method=ofa"]).training.method == OFA(
        gamma=(1.0, 2.0)
    )
    record.write_text(yaml.safe_dump({"options": {"gama": 1.0}}))
    with pytest.raises(SpecError, match="There are no such options: gama"):
        parse_distill(["--out", "x", "--config", str(record)])


@pytest.mark.parametrize(
    ("arguments", "own", "others"),
    [
        ([], "--gamma", "--feature-weight"),
        (["--method", "rkd"], "--feature-weight", "--gamma"),
        (["--recipe", "head"], "--ce-weight", "--temperature"),
    ],
)
def test_help_shows_the_common_options_and_those_of_the_method(
    capsys: pytest.CaptureFixture[str], arguments: list[str], own: str, others: str
) -> None:
    assert run("distill", *arguments, "--help") == 0
    shown = capsys.readouterr().out
    assert own in shown
    assert f"{others} " not in shown
    assert "--epochs" in shown
    assert "--method NAME --help" in " ".join(shown.replace("│", " ").split())


def test_help_loads_neither_torch_nor_timm() -> None:
    program = (
        "import sys\nfrom cka_probe.cli.main import main\n"
        "try: main(['distill', '--method', 'crd', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_the_warm_up_of_a_recipe_keeps_its_share_of_a_short_run() -> None:
    asked = ["--out", "x", "--recipe", "digits"]
    assert parse_distill([*asked, "--epochs", "4"]).training.warmup_epochs == 5 * 4 / 100
    assert parse_distill([*asked, "--epochs", "5"]).training.warmup_epochs == 5, "it fits"
    assert parse_distill([*asked, "--epochs", "4", "--warmup-epochs", "6"]).training.warmup_epochs == 6, (
        "and is refused"
    )


def test_a_record_of_before_names_its_options_as_it_did(tmp_path: Path) -> None:
    record = tmp_path / "run.yaml"
    record.write_text(yaml.safe_dump({"options": {"student": "zoo:vit", "memory": 2.5}}))
    assert parse_distill(["--out", "x", "--config", str(record)]).training.image_cache == 2.5
    now = resumed_config(Training(student=""), {"student": "zoo:vit", "memory": 2.5}, frozenset())
    assert now.image_cache == 2.5


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_known_options_in_range(name: str) -> None:
    values = recipe(name)
    config = Training(
        student="zoo:vit", method="none", **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )
    check_training(config)
    for field in fields(Training):
        if isinstance(field.default, float):
            assert isinstance(getattr(config, field.name), (float, int)), field.name


def test_the_recipes_are_those_of_the_paper() -> None:
    cnn, token = recipe("cifar-cnn"), recipe("cifar-token")
    assert (cnn["optimizer"], cnn["lr"], cnn["weight_decay"], cnn["min_lr"], cnn["warmup_epochs"]) == (
        "sgd", 0.05, 0.002, 0.001, 3,
    )  # fmt: skip
    assert (token["lr"], token["weight_decay"], token["min_lr"], token["warmup_lr"], token["clip"]) == (
        5e-4, 0.05, 1e-5, 5e-7, 5,
    )  # fmt: skip
    assert recipe("imagenet-token")["ema"] == 0.99996


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "zoo:vit@random"], "--method ofa needs a teacher"),
        (["--teacher", "zoo:cnn"], "needs a student: --student SPEC"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--recipe", "mnist"], "--recipe must be one of cifar-cnn"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--config", "nowhere.yaml"],
            "not exist (--config)",
        ),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--lr", "-1"],
            "--lr must be a finite number above 0",
        ),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--method", "kd", "--gamma", "2"],
            "--gamma is an option of ofa and fbt, but the method is kd",
        ),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--feature-weight=2"],
            "--feature-weight is an option of fbt, fitnet, cc, rkd, crd and rsd, but the method is ofa",
        ),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--method", "rdk"], "Close names: rsd, rkd, dkd"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--gamma", "0.5"],
            "--gamma must be finite numbers, each",
        ),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--gamma", "1", "2"], "or 5: one for each of the 4 stages"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--ema", "1"],
            "--ema must be a number above 0 and",
        ),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--stages", "7"], "numbers from 1 to 4"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--mixup", "1", "--batch-size", "9"], "an even --batch-size"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--data", "nowhere"], "there is no folder 'nowhere'"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--batch-size", "2000"], "must fill a batch of 2000"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--optimizer", "none"], "--optimizer must be one of timm's"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--student-layers", "x"],
            "No layer of 'zoo:vit' matches 'x'",
        ),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--stages", "auto", "--epochs", "1"], "needs epochs after"),
        (["--student", "zoo:vit", "--teacher", "zoo:cnn", "--device", "cuda:9"], "--device must be auto or one of cpu"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--rand-augment", "rand-m9-x1"],
            "--rand-augment must be written as timm does",
        ),
        (["--resume"], "There is no run to resume in --out"),
        (
            ["--student", "zoo:vit", "--teacher", "zoo:cnn", "--epochs", "4", "--warmup-epochs", "5"],
            "--warmup-epochs must be at most --epochs, 4, but is 5",
        ),
    ],
)
def test_bad_input_gets_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("distill", *arguments, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert files_below(tmp_path) == [], "nothing is left, so that the mended command runs"


@pytest.mark.full
def test_a_run_says_what_came_out_and_its_record_repeats_it(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*quick(colours, tmp_path / "one", "--method", "kd")) == 0
    output = capsys.readouterr()
    assert output.out.startswith("Top-1 ")
    assert f"Student: {tmp_path / 'one' / 'student.safetensors'}" in output.out
    assert run("distill", "--config", str(tmp_path / "one" / "run.yaml"), "--out", str(tmp_path / "two")) == 0
    students = [(tmp_path / which / "student.safetensors").read_bytes() for which in ("one", "two")]
    assert students[0] == students[1]
    modes = {(tmp_path / "one" / name).stat().st_mode for name in ("student.safetensors", "run.yaml")}
    assert len(modes) == 1  # whoever reads the record can read the weights


def test_evaluate_says_what_it_measured_and_how(
    colours: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("evaluate", spec("teacher"), "--data", str(colours), "--workers", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"Data {colours / 'val'} (part val)",
        "Input 16 × 16 px, RGB, bicubic, center crop 1, mean 0.1 0.1 0.1, std 0.3 0.3 0.3",
        "Classes 3, matched by order",
        "Images 36",
        "Top-1 100.00% (95% interval 90.36% to 100.00%)",
    ]
    assert run("evaluate", "zoo:cnn", "--workers", "0") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Top-5 ")
    assert run("evaluate", "zoo:cnn", "--data", str(colours)) == 2
    assert "must have the data's 3 classes, but 'zoo:cnn' has 10" in capsys.readouterr().err


@pytest.mark.full
def test_an_interrupt_exits_with_130_and_says_how_to_go_on(colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cka_probe", *quick(colours, out, "--epochs", "500", "--method", "kd")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = time.monotonic()
        while not (out / "metrics.csv").exists() and time.monotonic() - started < 60:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
        assert process.wait(60) == 130, error
    assert f"interrupted. Go on with: cka-probe distill --resume --out {out}" in error
    assert "Traceback" not in error


def test_config_ranges_are_checked() -> None:
    with pytest.raises(SpecError, match="--branch-budget must be a number above 0 and at most 1"):
        check_training(Training(student="zoo:vit", teacher="zoo:cnn", method=OFA(branch_budget=1.5)))
