"""Specs of measures: what they parse to, their canonical form, and a measure of a stranger's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from numpy.typing import NDArray

import cka_probe as cp
from cka_probe.cli.main import main
from cka_probe.errors import SpecError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.measure import About, Measure, Setup, options_of
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.measures import linear_cka, rbf_cka
from cka_probe.measures.catalogue import MEASURES, about, label, listing, parse_measure, parse_measures
from cka_probe.reports.run_files import read_comparison
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.ranges import Range

Matrix = NDArray[np.float64]


@pytest.mark.parametrize(
    ("spec", "measure", "canonical"),
    [
        ("cka", cp.LinearCKA(), "cka"),
        ("cka:debiased", cp.LinearCKA(), "cka"),
        ("cka:biased", cp.LinearCKA("biased"), "cka:biased"),
        ("cka-rbf:1.0", cp.RbfCKA(), "cka-rbf"),
        ("cka-rbf:0.80", cp.RbfCKA(0.8), "cka-rbf:0.8"),
        ("cka-rbf:8e-1", cp.RbfCKA(0.8), "cka-rbf:0.8"),
        ("cka-rbf:2", cp.RbfCKA(2.0), "cka-rbf:2"),
        ("cka-rbf:2.", cp.RbfCKA(2), "cka-rbf:2"),
        ("cka-rbf:1e6", cp.RbfCKA(10**6), "cka-rbf:1000000"),
        (
            "cka-rbf:biased:with-diagonal:.8",
            cp.RbfCKA(0.8, "with-diagonal", "biased"),
            "cka-rbf:0.8:with-diagonal:biased",
        ),
        ("rsa:kendall:euclidean", cp.RSA("euclidean", "kendall"), "rsa:euclidean:kendall"),
        ("rsa:spearman", cp.RSA(), "rsa"),
        ("mantel:9999", cp.Mantel(9999), "mantel:9999"),
        ("mantel:999:cosine", cp.Mantel(rdm="cosine"), "mantel:cosine"),
        ("mutual-knn:20", cp.MutualKNN(np.int64(20)), "mutual-knn:20"),
        ("svcca:0.950", cp.SVCCA(np.float64(0.95)), "svcca:0.95"),
        (" svcca : 1.0 ", cp.SVCCA(1), "svcca:1"),
    ],
)
def test_a_spec_parses_to_a_value_and_back_to_its_canonical_form(spec: str, measure: Measure, canonical: str) -> None:
    found = parse_measure(spec.replace(" : ", ":"))
    assert found == measure
    assert hash(found) == hash(measure)
    assert str(found) == str(measure) == canonical
    assert parse_measure(canonical) == measure


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cka-rfb", r"Unknown measure 'cka-rfb' .* Did you mean 'cka-rbf'"),
        ("CKA", r"Unknown measure 'CKA' .* Did you mean 'cka'"),
        ("", "Unknown measure ''"),
        ("cka-biased", "The measure cka-biased is called cka:biased now"),
        ("cka:", r"cka has no option ''\. Its form is cka\[:debiased\|biased\]"),
        ("cka:3", r"cka has no option '3'\. Its form"),
        ("cka:rbf:0.5", r"cka has no option 'rbf'\. Did you mean 'cka-rbf:0.5'\?"),
        ("cka:baised", r"cka has no option 'baised'\. Did you mean 'biased'"),
        ("rsa:Kendall", r"Did you mean 'kendall'\?"),
        ("rsa:kendall:spearman", "rsa takes one comparison, but 'kendall' and 'spearman' both set it"),
        ("cka-rbf:1:2", "cka-rbf takes one threshold, but '1' and '2' both set it"),
        ("cka-rbf:biased:biased", "cka-rbf takes one estimator"),
        ("cka-rbf:0", r"threshold of cka-rbf must be a number from 0\.001 to 1,000,000, but is 0"),
        ("cka-rbf:nan", "threshold of cka-rbf must be .* but is nan"),
        ("cka-rbf:1e999", "threshold of cka-rbf must be .* but is inf"),
        ("cka-rbf:1_0", "cka-rbf has no option '1_0'"),
        ("cka-rbf:٣", "cka-rbf has no option"),
        ("mutual-knn:2.5", r"neighbours of mutual-knn must be a whole number from 1 to 1,000,000, but is 2\.5"),
        ("mantel:0", "permutations of mantel must be a whole number from 1"),
        ("svcca:1.01", "variance of svcca must be a number above 0 and at most 1"),
    ],
)
def test_a_spec_that_is_wrong_says_what_is_and_what_is_close(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_measure(spec)


def test_a_value_that_is_wrong_is_refused_when_it_is_made() -> None:
    with pytest.raises(SpecError, match="estimator of cka must be one of debiased, biased, but is 'unbiased'"):
        cp.LinearCKA("unbiased")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="threshold of cka-rbf"):
        cp.RbfCKA(-1)
    with pytest.raises(FrozenInstanceError):
        cp.RbfCKA().threshold = 3.0  # type: ignore[misc]


def test_equal_specs_are_refused_and_different_options_stand_beside_each_other() -> None:
    assert [str(one) for one in parse_measures("cka-rbf:0.2, cka-rbf:0.8,cka")] == ["cka-rbf:0.2", "cka-rbf:0.8", "cka"]
    with pytest.raises(SpecError, match=r"names cka-rbf twice, as cka-rbf and as cka-rbf:1\.0"):
        parse_measures("cka-rbf,cka-rbf:1.0")
    with pytest.raises(SpecError, match=r"names rsa twice\."):
        parse_measures(["rsa", "rsa"])
    with pytest.raises(SpecError, match="at least one"):
        parse_measures([])


def test_a_word_sets_one_option_alone_and_a_number_no_more_than_one() -> None:
    for measure in MEASURES.values():
        allowed = [words for _, words in options_of(measure).values()]
        words = [word for choice in allowed if not isinstance(choice, Range) for word in choice]
        assert len(words) == len(set(words)), measure
        assert sum(isinstance(choice, Range) for choice in allowed) <= 1, measure
        assert measure().about.title


@pytest.mark.full
def test_rows_labels_and_files_carry_the_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    specs = "cka-rbf:0.2,cka-rbf:0.80,cka:biased"
    command = ["compare", "zoo:cnn", "--examples", "64", "--batch-size", "32", "--layers", "stages", "--out", str(out)]
    assert main([*command, "--measures", specs]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"similarity.npz", "similarity.cka-rbf-0.8.npz", "similarity.cka-biased.npz"} <= names
    assert {"heatmap.png", "heatmap.cka-rbf-0.8.png", "heatmap.cka-biased.svg"} <= names
    assert not [name for name in names if ":" in name]
    assert list(pd.read_csv(out / "similarity.csv")["measure"].unique()) == ["cka-rbf:0.2", "cka-rbf:0.8", "cka:biased"]
    assert yaml.safe_load((out / "run.yaml").read_text())["options"]["measures"] == "cka-rbf:0.2,cka-rbf:0.8,cka:biased"
    results = read_comparison(out).results
    assert list(results) == ["cka-rbf:0.2", "cka-rbf:0.8", "cka:biased"]
    assert "RBF CKA, debiased, σ = 0.8 × median distance" in (out / "report.html").read_text()
    again = specs.replace("cka-rbf:0.2", "cka-rbf:debiased:0.2")
    assert main([*command, "--measures", again, "--resume"]) == 0  # the same run, finished
    assert main(["report", str(out)]) == 0


def test_measures_with_other_bandwidths_share_their_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    real = cp.measures.rbf_cka.squared_distances

    def counted(gram: torch.Tensor) -> torch.Tensor:
        computed.append(len(gram))
        return real(gram)

    monkeypatch.setattr("cka_probe.estimation.gram.squared_distances", counted)
    features = [torch.randn(40, width, generator=torch.Generator().manual_seed(width)) for width in (3, 7)]
    found = cp.compare(
        {"x": features[0], "y": features[1]}, measures=["cka-rbf:0.2", "cka-rbf:0.8", "cka"], batch_size=20
    )
    assert computed == [20] * 4  # a layer and batch
    alone = cp.compare({"x": features[0], "y": features[1]}, measures="cka-rbf:0.8", batch_size=20)
    np.testing.assert_array_equal(found["cka-rbf:0.8"].values, alone.values)
    assert found["cka-rbf:0.2"].values[0, 1] != found["cka-rbf:0.8"].values[0, 1]


def test_mantel_has_permutations_of_its_own() -> None:
    x = np.random.default_rng(0).standard_normal((30, 4))
    found = cp.compare({"x": x, "y": x @ x[:4]}, measures=["mantel:49", "rsa"], permutations=19, batch_size=30)
    assert found["mantel:49"].provenance.others["permutations"] == 49
    assert found["rsa"].provenance.others["permutations"] == 19


def naive(spec: str, x: Matrix, y: Matrix) -> float:
    """As the functions on arrays have it, which have oracles of their own."""
    functions: dict[str, Callable[[], float]] = {
        "cka:biased": lambda: cp.linear_cka(x, y, debiased=False),
        "cka-rbf:0.3:with-diagonal:biased": lambda: cp.rbf_cka(
            x, y, threshold=0.3, median="with-diagonal", debiased=False
        ),
        "rsa:cosine:pearson": lambda: cp.rsa(x, y, rdm="cosine", comparison="pearson"),
        "mantel:5:euclidean": lambda: cp.mantel(x, y, rdm="euclidean", permutations=1).r,
        "mutual-knn:4": lambda: cp.mutual_knn(x, y, neighbours=4),
        "svcca:0.7": lambda: cp.svcca(x, y, variance=0.7),
        "mean-cca": lambda: cp.mean_cca(x, y),
        "procrustes": lambda: cp.procrustes(x, y),
    }
    return functions[spec]()


@pytest.mark.parametrize(
    "spec",
    [
        "cka:biased", "cka-rbf:0.3:with-diagonal:biased", "rsa:cosine:pearson", "mantel:5:euclidean", "mutual-knn:4",
        "svcca:0.7", "mean-cca", "procrustes",
    ],
)  # fmt: skip
def test_every_option_reaches_the_arrays_and_the_loop(spec: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((48, 5))
    y = x @ rng.standard_normal((5, 6)) + rng.standard_normal((48, 6))
    expected = naive(spec, x, y)
    assert parse_measure(spec)(x, y) == pytest.approx(expected, abs=1e-12)
    found = cp.compare({"x": x, "y": y}, measures=spec, examples=48, batch_size=48)
    order = cp.compare({"x": x, "y": y}, measures=parse_measure(spec), examples=48, batch_size=48)
    assert found.values[0, 1] == pytest.approx(expected, abs=1e-6)  # collected features are float32
    assert order.values[0, 1] == found.values[0, 1]
    assert found.measure == str(parse_measure(spec))
    plain = cp.compare({"x": x, "y": y}, measures=spec.split(":")[0], examples=48, batch_size=48)
    if ":" in spec:
        assert plain.measure != found.measure


ROTATED, MOVED, SCALED, MAPPED, EACH_SCALED = (
    "orthogonal maps",
    "translation",
    "isotropic scaling",
    "linear map",
    "each",
)


@pytest.mark.parametrize(
    ("spec", "stays", "changes"),
    [
        ("cka", (ROTATED, MOVED, SCALED), (MAPPED,)),
        ("cka-rbf", (ROTATED, MOVED, SCALED), (MAPPED,)),
        ("rsa", (SCALED,), (ROTATED, MOVED, MAPPED)),
        ("rsa:euclidean", (ROTATED, MOVED, SCALED), (MAPPED,)),
        ("rsa:cosine", (ROTATED, SCALED, EACH_SCALED), (MOVED, MAPPED)),
        ("mantel:1", (SCALED,), (ROTATED, MOVED)),
        ("mean-cca", (ROTATED, MOVED, SCALED, MAPPED), (EACH_SCALED,)),
        ("svcca:0.8", (ROTATED, MOVED, SCALED), (MAPPED,)),
        ("pwcca", (MOVED, SCALED), (ROTATED, MAPPED)),
        ("procrustes", (ROTATED, MOVED, SCALED), (MAPPED,)),
        ("mutual-knn:5", (ROTATED, SCALED, EACH_SCALED), (MOVED, MAPPED)),
    ],
)
def test_what_the_catalogue_says_of_invariance_holds(
    spec: str, stays: tuple[str, ...], changes: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((60, 6)) * (1, 1, 2, 2, 3, 4) + 0.5
    y = x @ rng.standard_normal((6, 5)) + rng.standard_normal((60, 5))
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    maps = {
        ROTATED: x @ rotation,
        MOVED: x + 3 * rng.standard_normal(6),
        SCALED: 2.5 * x,
        MAPPED: x @ (rng.standard_normal((6, 6)) + 2 * np.eye(6)) * (1, 9, 1, 1, 1, 9),
        EACH_SCALED: x * rng.uniform(0.5, 2, (60, 1)),
    }
    measure = parse_measure(spec)
    value = measure(x, y)
    for name in stays:
        assert measure(maps[name], y) == pytest.approx(value, abs=1e-9), name
    for name in changes:
        assert abs(measure(maps[name], y) - value) > 1e-3, name


@pytest.mark.slow
def test_the_catalogues_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measures"]) == 0
    told = capsys.readouterr().out
    for name, (form, _) in zip(MEASURES, listing(), strict=True):
        assert form.partition("[")[0] == name
        assert f"\n{form}\n" in told
    assert "THRESHOLD: a number from 0.001 to 1,000,000, by default 1." in told
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    for name in ("none", "kd", "ofa", "fitnet", "cc", "rkd", "crd", "rsd", "dkd", "dist"):
        assert f"\n{name}\n" in told
    assert "Options: --ce-weight 1.0, --temperature 1.0, --kd-weight 1.0, --standardize-logits" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--measures", "cka-biased"], "The measure cka-biased is called cka:biased now"),
    ],
)
def test_what_version_0_1_had_is_refused_with_its_replacement(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "zoo:cnn", *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "provenance", "spec"),
    [
        ("cka", {"debiased": True}, "cka"),
        ("cka", {"debiased": False}, "cka:biased"),
        ("cka-biased", {"debiased": False}, "cka:biased"),
        ("cka-rbf", {"debiased": True, "threshold": 0.4, "median": "with-diagonal"}, "cka-rbf:0.4:with-diagonal"),
        ("rsa", {"rdm": "euclidean", "rdm_comparison": "kendall"}, "rsa:euclidean:kendall"),
        ("mantel", {"rdm": "cosine", "rdm_comparison": "pearson", "permutations": 99}, "mantel:99:cosine"),
        ("rsa", {"rdm": "correlation", "rdm_comparison": "spearman", "permutations": 99}, "rsa"),
        ("mutual-knn", {"neighbours": 5}, "mutual-knn:5"),
        ("svcca", {"variance": 0.99}, "svcca"),
        ("somebody's", {"threshold": 0.4}, "somebody's"),
    ],
)
def test_a_result_of_version_0_1_is_read_with_the_spec_of_its_measure(
    name: str, provenance: dict[str, Any], spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, one = (Layer("a", "x"),), np.ones((1, 1))
    monkeypatch.setattr("cka_probe.results.similarity.FORMAT", 1)
    Similarity(one, one, one, layers, layers, name, Provenance.from_record(provenance)).save(tmp_path / "old.npz")
    monkeypatch.undo()
    assert Similarity.load(tmp_path / "old.npz").measure == spec


@dataclass(frozen=True)
class Shifted(Measure):
    """CKA with a kernel of a stranger's own: what a new measure has to say."""

    name = "shifted"
    about = About("shifted CKA", range="-1 to 1", invariant_to="nothing", source="a stranger 2026", zero_by_chance=True)
    gram_bytes = 4

    shift: Annotated[float, Range(0, 10)] = 1.0
    sign: Literal["plus", "minus"] = "plus"

    def __call__(self, x: Any, y: Any) -> float:
        return linear_cka.linear_cka(x, y)

    def start(self, setup: Setup) -> StreamingCKA:
        return StreamingCKA(setup, _Kernel(self.shift), debiased=True)


class _Kernel:
    def __init__(self, shift: float) -> None:
        self._shift = shift

    def gram(self, layer: int, features: Features) -> torch.Tensor:
        return (features.gram.double() / features.gram.abs().max() + self._shift) ** 2

    def details(self) -> dict[str, Any]:
        return {"kernel": "shifted"}

    def settled(self) -> None:
        return None

    def settle(self, state: None) -> None:
        pass


@pytest.mark.full
def test_a_measure_of_a_stranger_s_own_is_a_class_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MEASURES, "shifted", Shifted)
    assert main(["measures"]) == 0
    assert "shifted[:SHIFT][:plus|minus]" in capsys.readouterr().out
    out = tmp_path / "out"
    command = ["compare", "zoo:cnn", "zoo:mlp", "--examples", "64", "--batch-size", "32", "--layers", "stages"]
    assert main([*command, "--measures", "cka,shifted:minus:3", "--memory", "8GB", "--out", str(out)]) == 0
    assert (out / "heatmap.shifted-3-minus.png").is_file()
    assert "shifted CKA (3, minus)" in (out / "report.html").read_text()
    assert main(["check", "--device", "cpu"]) == 1  # a check that compares it with what it says of arrays
    assert "in the loop as on arrays, shifted" in capsys.readouterr().out


def test_an_unknown_measure_is_a_similarity_by_its_own_name() -> None:
    assert about("somebody's").kind == "similarity"
    assert label("somebody's:3") == "somebody's:3"
    assert label("cka-rbf:0.8") == "RBF CKA (0.8)"
    assert label("cka") == "linear CKA"
    assert rbf_cka.THRESHOLDS == (0.001, 10**6)
