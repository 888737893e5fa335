"""Options are checked before anything is loaded: numbers, paths, names."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import FrozenInstanceError, fields, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import cka_probe as cp
from cka_probe.cli.compare import Compare
from cka_probe.cli.distill import Distill
from cka_probe.cli.extract import Extract
from cka_probe.distill.config import GROUPS as DISTILL_GROUPS
from cka_probe.distill.config import Networks, Training
from cka_probe.distill.config_checks import check_training
from cka_probe.distill.evaluation.accuracy import evaluate
from cka_probe.distill.methods import METHODS
from cka_probe.distill.options import Evaluation
from cka_probe.errors import CkaProbeError, SpecError
from cka_probe.probing.compare import list_layers
from cka_probe.probing.option_checks import check_report_options
from cka_probe.probing.options import Execution, FeatureOptions, Images, Measuring, Options, Running, _annotations
from cka_probe.runtime.paths import existing_file, existing_folder, usable_path
from cka_probe.runtime.ranges import Range

NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "4", None, [4], 10**400, -(10**5000)]


@pytest.fixture
def _nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded before the options were checked")

    for name in ("probing.subjects.load_subject", "probing.subjects.open_source", "distill.subjects.load_subject"):
        monkeypatch.setattr(f"cka_probe.{name}", loaded)
    monkeypatch.setattr("cka_probe.images.parts.open_parts", loaded)


def checked(options: Options) -> None:
    """Check a group of options; all those of a distillation together too."""
    if isinstance(options, Training):
        check_training(options)
    else:
        options.check()


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=range(len(NOT_NUMBERS)))
def test_a_range_refuses_what_is_no_finite_number(value: object) -> None:
    for range_ in (Range(0, 100, whole=True), Range(0, 100), Range()):
        assert value not in range_
        with pytest.raises(SpecError, match="--lr must be .*, but is "):
            range_.check("--lr", value)


def test_a_range_takes_the_numbers_in_it_and_numpy_s() -> None:
    assert all(value in Range(1, 3, whole=True) for value in (1, 3, np.int64(2), np.uint8(1)))
    assert all(value not in Range(1, 3, whole=True) for value in (0, 4, 2.0, np.float64(2), np.bool_(True)))
    assert 0 not in Range(0, open_low=True)
    assert 1 not in Range(0, 1, open_high=True)
    assert np.float32(0.5) in Range(0, 1)
    Range(optional=True).check("--clip", None)
    Range(1, many=True).check("--gamma", np.array([1.0, 2.0]))
    for wrong in ((), (0.5,), 1.0, "12"):
        with pytest.raises(SpecError, match="--gamma must be finite numbers, each of at least 1, but is"):
            Range(1, many=True).check("--gamma", wrong)


SHARED: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 3}, "--batch-size must be a whole number from 4"),
    ({"batch_size": 10.5}, "--batch-size .* but is 10.5"),
    ({"examples": 10.5}, "--examples .* but is 10.5"),
    ({"examples": True}, "--examples .* but is True"),
    ({"image_size": 0}, "--image-size .* from 1 to 16,384"),
    ({"image_size": 10**8}, "--image-size .* but is 100000000"),
    ({"seed": -1}, "--seed .* but is -1"),
    ({"seed": 2**64}, "--seed .* to 18,446,744,073,709,551,615"),
    ({"workers": -1}, "--workers .* but is -1"),
    ({"workers": 10**6}, "--workers .* from 0 to 1,024"),
    ({"checkpoint_minutes": math.nan}, "--checkpoint-minutes .* but is nan"),
    ({"mean": (0.5, math.inf, 0.5)}, "--mean must be numbers"),
    ({"std": (0.5, 0.0, 0.5)}, "--std must be numbers, each above 0"),
    ({"std": 0.5}, "--std must be numbers"),
    ({"views": "blur:nan"}, "blur:SIGMA"),
    ({"views": "noise:1e400"}, "noise:STD"),
    ({"views": "jpeg:0"}, "jpeg:QUALITY"),
    ({"views": "nowhere.py:view"}, "The file nowhere.py does not exist"),
    ({"pool": "max"}, "--pool must be one of none, mean, cls"),
    ({"data": "/nope"}, r"The folder /nope does not exist \(--data\)\."),
    ({"data": "nope"}, "there is no folder 'nope'"),
    ({"data": "a\0b"}, "without NUL bytes"),
    ({"data": "x" * 300}, "each name in it at most 255"),
    ({"data": "/" + "é" * 200}, "each name in it at most 255"),
    ({"data": "/x\udcff"}, "must be a path in UTF-8"),
    ({"data": ""}, "--data must be a path, but is empty"),
    ({"data": __file__}, "--data must be a folder"),
    ({"paired": "/nope"}, r"The folder /nope does not exist \(--paired\)"),
    ({"data": "torch/cifar100"}, "torch/cifar100 needs the folder of the data set: --data-dir DIR"),
    ({"data": "torch/cifar100", "data_dir": "/nope"}, r"The folder /nope does not exist \(--data-dir\)"),
    ({"data_dir": "/tmp"}, "--data-dir and --download are for data sets .*, but the data are 'digits'"),
    ({"split": "third"}, "--split must be one of train, training, validation"),
    ({"data_dir": "x" * 300, "data": "torch/cifar100"}, "--data-dir must be at most"),
    ({"device": "meta"}, "--device must be auto or one of cpu"),
    ({"device": "xla"}, "--device must be auto or one of cpu"),
    ({"device": "cpu:7"}, "--device must be auto or one of cpu.*, but is 'cpu:7'"),
    ({"device": "cuda:99"}, "--device must be auto or one of cpu"),
    ({"device": ""}, "--device must be auto or one of cpu"),
    ({"device": "\udcff"}, "--device must be auto or one of cpu"),
    ({"models": []}, "at least one model"),
    ({"models": ["zoo:cnn", "zoo:cnn@random:18446744073709551616"]}, "The seed after '@random:'"),
    ({"models": ["zoo:cnn", "resnet18@random:" + 100 * "9"]}, "must be followed by a seed"),
    ({"models": ["zoo:cnn", "zoo:cnm"]}, "The zoo holds zoo:cnn"),
    ({"models": ["zoo:cnn", "resnet81"]}, "no model named 'resnet81'. Close names: resnet18"),
    ({"models": ["zoo:cnn", "zoo:vit@nowhere.pth"]}, "The checkpoint nowhere.pth does not exist"),
    ({"models": ["zoo:cnn", "nowhere.py:net"]}, "The file nowhere.py does not exist"),
    ({"models": ["zoo:cnn", "nowhere.npy"]}, "The features nowhere.npy do not exist"),
    ({"models": ["zoo:cnn", "x" * 300]}, "A model spec must be at most 4,096 bytes long"),
    ({"models": ["zoo:cnn", "zoo:vit@a\0b"]}, "without NUL bytes"),
]


@pytest.mark.parametrize(("options", "message"), SHARED)
@pytest.mark.usefixtures("_nothing_loads")
def test_compare_and_extract_refuse_before_anything_is_loaded(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    models, more = options.get("models", ["zoo:cnn"]), {k: v for k, v in options.items() if k != "models"}
    with pytest.raises(SpecError, match=message):
        cp.compare(models, **more)
    with pytest.raises(SpecError, match=message):
        cp.extract(models, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutations": 2**63}, "--permutations must be a whole number from 0 to 1,000,000"),
        ({"permutations": -1}, "--permutations"),
        ({"influence": -1}, "--influence"),
        ({"measures": "mutual-knn:0"}, "neighbours of mutual-knn must be a whole number"),
        ({"measures": "cka-rbf:1e300"}, "threshold of cka-rbf must be .* but is 1e\\+300"),
        ({"measures": "cka-rbf:nan"}, "threshold of cka-rbf must be .* but is nan"),
        ({"measures": "cka-rbf:0"}, "threshold of cka-rbf"),
        ({"memory": "1e999GB"}, "--memory must be a size"),
        ({"memory": "9" * 400 + "GB"}, "--memory must be a size"),
        ({"memory": "0GB"}, "--memory must be a size"),
        ({"memory": -5}, "--memory must be a size"),
        ({"memory": True}, "--memory must be a size"),
        ({"measures": []}, "--measures must name at least one"),
        ({"measures": "rbf"}, r"Unknown measure 'rbf' \(--measures\). Did you mean 'cka-rbf'\?"),
        ({"measures": "cka-rbf:mean"}, r"cka-rbf has no option 'mean'\. Its form is cka-rbf\[:THRESHOLD\]\[:off-diag"),
        ({"measures": "rsa:euclid"}, r"rsa has no option 'euclid'\. Did you mean 'euclidean'\?"),
        ({"measures": ["cka", "cka:debiased"]}, "names cka twice, as cka and as cka:debiased"),
        ({"measures": "cka,rsa"}, r"must be a sequence: measures=\['cka', 'rsa'\]"),
    ],
)
@pytest.mark.usefixtures("_nothing_loads")
def test_compare_refuses_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cp.compare(["zoo:cnn"], **options)


def test_numpy_s_numbers_are_as_good_as_python_s(tmp_path: Path) -> None:
    one, two = (
        cp.compare(["zoo:cnn"], examples=kind(16), batch_size=kind(8), seed=kind(3), layers="stages")
        for kind in (int, np.int64)
    )
    np.testing.assert_array_equal(one.values, two.values)
    two.save(tmp_path / "similarity.npz")
    assert cp.Similarity.load(tmp_path / "similarity.npz").provenance.batch_size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be a whole number from 1"),
        ({"image_size": 10**8}, "--image-size"),
        ({"workers": -1}, "--workers"),
        ({"data": "/nope"}, "The folder /nope does not exist"),
        ({"spec": "zoo:nothing"}, "The zoo holds"),
        ({"device": "meta"}, "--device must be auto or one of cpu"),
    ],
)
@pytest.mark.usefixtures("_nothing_loads")
def test_evaluate_refuses_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        evaluate(options.pop("spec", "zoo:cnn"), **options)


GROUPS: list[type[Options]] = [Images, Measuring, Running, Training, *METHODS.values()]
NUMBERS = [(group, name) for group in GROUPS for name, (_, range_) in _annotations(group).items() if range_]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_a_type_that_is_checked_and_a_default_that_passes(group: type[Options]) -> None:
    given: dict[str, Any] = {"student": "zoo:vit", "method": "none"} if group is Training else {}
    checked(group(**given))
    hints = get_type_hints(group)
    for name, (_, range_) in _annotations(group).items():
        is_number = any(kind in (int, float) for kind in (hints[name], *get_args(hints[name])))
        assert (range_ is not None) == (is_number or get_origin(hints[name]) is tuple or name in ("mean", "std")), name


@pytest.mark.parametrize(("group", "name"), NUMBERS)
def test_no_number_may_be_nan_infinite_or_a_text(group: type[Options], name: str) -> None:
    range_ = _annotations(group)[name][1]
    assert range_ is not None
    given: dict[str, Any] = {"student": "zoo:vit", "method": "none"} if group is Training else {}
    for value in (math.nan, math.inf, "1"):
        wrong: Any = (value, value) if range_.many else value
        with pytest.raises(SpecError, match=f"--{name.replace('_', '-')} must be"):
            checked(group(**given, **{name: wrong}))


@pytest.mark.parametrize("function", [cp.compare, cp.extract, evaluate])
def test_a_library_function_has_the_options_and_defaults_of_its_groups(function: Any) -> None:
    groups: dict[str, Any] = {}
    for group in GROUPS[:3] if function is not evaluate else [Evaluation]:
        groups |= {field.name: field.default for field in fields(group)}
    own = {"progress", "preview", "world", "checkpoint", "overwrite", "record"}
    found = {
        name: parameter.default
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name not in own
    }
    assert found == {name: groups[name] for name in found}
    left_out = set(groups) - set(found)
    not_of_extract = {"measures", "permutations", "curve", "influence", "memory", "scratch"}
    assert left_out == (not_of_extract if function is cp.extract else set())


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        (Compare, [Images, Measuring, Running]),
        (Extract, [Images, FeatureOptions, Execution]),
        (Distill, [*list(DISTILL_GROUPS.values())[:2], cp.OFA, *list(DISTILL_GROUPS.values())[2:]]),
    ],
)
def test_a_command_has_the_groups_as_they_are(command: Any, groups: list[type[Options]]) -> None:
    found = [field.default for field in fields(command) if isinstance(field.default, Options)]
    assert [type(default) for default in found] == groups
    assert found == [Networks(student="") if group is Networks else group() for group in groups]


def test_every_overload_of_compare_has_its_parameters() -> None:
    tree = ast.parse(Path(inspect.getsourcefile(cp.compare) or "").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "compare"]
    assert len(found) == 3
    for node in found:
        names = {argument.arg: ast.unparse(argument.annotation or node) for argument in node.args.kwonlyargs}
        del names["measures"]
        expected = {argument.arg: ast.unparse(argument.annotation or node) for argument in found[-1].args.kwonlyargs}
        del expected["measures"]
        assert names == expected


def test_a_group_is_frozen_and_takes_numpy_s_numbers() -> None:
    images = Images(examples=np.int64(8), mean=[np.float32(0.5)] * 3, seed=np.uint8(3))
    assert (images.examples, images.mean, images.seed) == (8, (0.5, 0.5, 0.5), 3)
    assert type(images.examples) is int
    with pytest.raises(FrozenInstanceError):
        images.examples = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (1, 0.2)}, "--crop-scale must be two numbers, the smaller one first"),
        ({"crop_scale": (-1, 2)}, "--crop-scale must be numbers, each above 0 and at most 1"),
        ({"crop_scale": (0.5,)}, "--crop-scale must be two numbers"),
        ({"crop_ratio": (0, 1)}, "--crop-ratio must be numbers, each above 0"),
        ({"crop_ratio": (2, 1)}, "--crop-ratio must be two numbers, the smaller one first"),
        ({"workers": -1}, "--workers"),
        ({"decay_epochs": 0}, "--decay-epochs must be a finite number above 0"),
        ({"method": cp.RKD(feature_weight=-1)}, "--feature-weight"),
        ({"method": cp.OFA(branch_weights=(0.0, 0.0))}, "--branch-weights must hold a number above 0"),
        ({"method": cp.OFA(branch_weights=(1e308, 1e308))}, "--branch-weights must hold .* and have a finite sum"),
        ({"method": cp.OFA(branch_weights=(1.0, math.nan))}, "--branch-weights must be finite numbers"),
        ({"crop_scale": (0.2, math.nan)}, "--crop-scale must be numbers"),
        ({"mixup": math.inf}, "--mixup must be a number from 0 to 1,000,000, but is inf"),
        ({"method": cp.KD(temperature=1e300)}, "--temperature must be a number above 0 and at most 1,000,000"),
        ({"warmup_epochs": 101}, "--warmup-epochs must be at most --epochs, 100, but is 101"),
        ({"optimizer": "adahessian"}, "--optimizer must be one that needs gradients alone.* 'adahessian' raised"),
        ({"seed": 99999999999999999999}, "--seed"),
        ({"probe_examples": 1}, "--probe-examples must be a whole number from 4"),
        ({"batch_size": 0}, "--batch-size"),
        ({"method": cp.OFA(stages="1,x")}, "--stages must be all, none, last, auto, or numbers"),
        ({"method": "ofa2"}, "--method must be one of none, kd, ofa"),
        ({"method": cp.OFA(similarity="/")}, "--similarity is for --stages auto, but --stages is 'all'"),
        ({"method": cp.OFA(stages="auto", probe_epochs=100), "teacher": "zoo:cnn"}, "needs epochs after its --probe-e"),
        ({"method": cp.KD()}, "--method kd needs a teacher"),
        ({"train": "head", "method": cp.KD(), "teacher": "zoo:cnn"}, "use --method none with it, not kd"),
        ({"schedule": "linear"}, "--schedule must be one of cosine, step, none"),
        ({"bf16": "yes"}, "--bf16 must be true or false"),
        ({"data": 3}, "--data must be a text"),
        ({"optimizer": "sgdd"}, "--optimizer must be one of timm's.*Close names: .*sgd"),
        ({"data": "/nope"}, "The folder /nope does not exist"),
        (
            {"method": cp.FitNet(stages="auto", similarity="/nope")},
            r"The comparison '/nope' does not exist \(--similarity\)",
        ),
        ({"student": "zoo:nothing"}, "The zoo holds"),
        ({"method": "kd", "teacher": "zoo:cnn@nowhere.pth"}, "The checkpoint nowhere.pth does not exist"),
        *(
            ({"rand_augment": text}, "--rand-augment must be written as timm does")
            for text in (
                "",
                "rand-x1",
                "rand-m",
                "rand-m9-n",
                "auto-m9",
                "rand-tweights-n99",
                "rand-p",
                "rand-tfoo",
            )
        ),
    ],
)
@pytest.mark.usefixtures("_nothing_loads")
def test_a_distillation_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_training(Training(**{"student": "zoo:vit", "method": "none", **options}))


WRONG: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    10**400,
    "",
    "a\0b",
    b"x",
    None,
    (),
    (2.0, 1.0),
    (1e-3, math.nan),
    1j,
]
"""A value of each kind of mistake; those that an option takes are left out by its type."""


LATER = ("teacher", "student_layers", "teacher_layers", "device", "reference")


def takes(group: type[Options], name: str, value: Any) -> bool:
    """Whether the value is one that the option may have, by its annotation alone."""
    kind = get_type_hints(group)[name]
    range_ = _annotations(group)[name][1]
    if value is None:
        return type(None) in get_args(kind) or bool(range_ and range_.optional)
    if range_ is None:
        return False
    if range_.many:
        return isinstance(value, tuple) and all(one in range_ for one in value) and (bool(value) or range_.optional)
    return value in range_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"),
    [(group, field.name) for group in (Training, Evaluation, *METHODS.values()) for field in fields(group)],
)
@pytest.mark.usefixtures("_nothing_loads")
def test_a_wrong_value_of_any_option_is_refused_by_its_name(group: type[Options], name: str) -> None:
    given: dict[str, Any] = {"student": "zoo:vit", "method": "none"} if group is Training else {}
    for value in WRONG:
        # No teacher is needed; layers are known later, and devices when the processes meet.
        if takes(group, name, value) or (isinstance(value, str) and name in LATER):
            continue
        with pytest.raises(SpecError) as caught:
            checked(group(**{**given, name: value}))
        assert "\n" not in str(caught.value)


def test_numpy_s_numbers_in_a_distillation_become_python_s() -> None:
    config = Training(
        student="zoo:vit", method="none", epochs=np.int64(3), lr=np.float32(0.5), crop_scale=[np.float64(0.5), 1]
    )
    assert [type(value) for value in (config.epochs, config.lr, config.crop_scale)] == [int, float, tuple]
    assert (config.epochs, config.lr, config.crop_scale) == (3, 0.5, (0.5, 1))
    check_training(config)


def test_sgd_without_momentum_is_the_plain_one() -> None:
    from torch import nn

    from cka_probe.distill.training.learner import make_optimizer

    config = Training(student="zoo:vit", method="none", optimizer="sgd", momentum=0.0)
    check_training(config)
    assert make_optimizer(nn.Linear(1, 1), config).defaults["nesterov"] is False
    assert make_optimizer(nn.Linear(1, 1), replace(config, momentum=0.9)).defaults["nesterov"] is True


@pytest.mark.parametrize(
    "spec",
    [
        "img_size=0",
        "img_size=abc",
        "img_size=(1,2,3)",
        "patch_size=0",
        "depth=-1",
        "num_classes=-3",
        "in_chans=0",
        "depth=x",
    ],
)
def test_impossible_arguments_of_a_model_are_told(spec: str) -> None:
    with pytest.raises(CkaProbeError, match="vit_tiny_patch16_224"):
        list_layers(f"vit_tiny_patch16_224,{spec}@random")


def test_report_takes_a_folder_or_two_runs(tmp_path: Path) -> None:
    check_report_options(tmp_path, None, None, None)
    check_report_options(None, tmp_path, tmp_path, tmp_path / "new")
    for wrong in ((None, None, None, None), (tmp_path, tmp_path, None, None), (None, tmp_path, None, tmp_path)):
        with pytest.raises(SpecError, match="report takes the folder of a run, or two of them"):
            check_report_options(*wrong)
    with pytest.raises(SpecError, match=r"does not exist \(--before\)"):
        check_report_options(None, tmp_path / "no", tmp_path, tmp_path / "new")


def test_paths_are_expanded_and_kinds_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert usable_path("~/x", "--out") == tmp_path / "x"
    assert existing_folder("~", "--data") == tmp_path
    assert existing_file("~/file", "--config") == tmp_path / "file"
    with pytest.raises(SpecError, match="--data must be a folder, but .*file is a file"):
        existing_folder(tmp_path / "file", "--data")
    with pytest.raises(SpecError, match="--config needs a file, but .* is a folder"):
        existing_file(tmp_path, "--config")
