"""The whole training: that it learns, resumes to the same bits, chooses, exports, and stops where it must."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import cka_probe as cp
from cka_probe.distill import losses, methods
from cka_probe.distill.config import Training, as_record
from cka_probe.distill.training.pipeline import Batch
from cka_probe.distill.training.progress import Live, is_part
from cka_probe.distill.training.run import loop
from cka_probe.distill.training.run.finish import Distilled
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import CkaProbeError, OutputError, SpecError, TrainingError
from tests.distill.conftest import spec

Options = Callable[..., Training]


class Killed(BaseException):
    """As good as a kill: nothing of the run gets to go on."""


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student.safetensors")


def assert_same(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch, config: Training, out: Path, **resuming: Any) -> None:
    """Run, and stop without warning in the step after so many."""
    done, whole = 0, TrainingStep.__call__

    def counting(self: TrainingStep, batch: Batch, *, update: bool) -> dict[str, Tensor]:
        nonlocal done
        if done == steps:
            raise Killed
        done += 1
        return whole(self, batch, update=update)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "__call__", counting)
        with pytest.raises(Killed):
            distill(config, out, **resuming)


@pytest.fixture(scope="module")
def _often() -> Iterator[None]:
    """Look after every second update: the runs here have six an epoch."""
    before = loop.CHECK_EVERY
    loop.CHECK_EVERY = 2
    yield
    loop.CHECK_EVERY = before


pytestmark = pytest.mark.usefixtures("_often")


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name not in ("obow", "words")])
def test_every_method_trains_and_its_student_is_measured(method: str, options: Options, tmp_path: Path) -> None:
    teacher = {"none": None, "fbt": spec("whole_teacher")}.get(method, spec("teacher"))
    config = options(method=method, epochs=2, teacher=teacher)
    done = distill(config, tmp_path / "out")
    assert len(done.metrics) == 2
    falls = "ce" if method == "crd" else "loss"  # what CRD contrasts with changes as it learns
    assert done.metrics[-1][falls] < done.metrics[0][falls]
    parts = {
        "none": set(), "kd": {"kd"}, "ofa": {"ofa", "branch_1", "branch_2", "branch_3", "branch_4"},
        "fitnet": {"hint_1", "hint_2", "hint_3", "hint_4"}, "cc": {"cc"}, "rkd": {"distance", "angle"},
        "crd": {"crd", "crd_teacher"}, "rsd": {"rsd"}, "dkd": {"dkd"}, "dist": {"dist"},
        "fbt": {
            "teacher_student_features", "teacher_student_logits", "teacher_assistant_features",
            "teacher_assistant_logits", "assistant_student_features", "assistant_student_logits", "test_top1_assistant",
        },
    }[method]  # fmt: skip
    usual = {"epoch", "updates", "lr", "loss", "ce", "train_top1", "test_top1", "images_per_second"}
    assert set(done.metrics[-1]) - usual == parts


@pytest.mark.slow
def test_a_run_with_no_branch_has_the_final_logits_alone(options: Options, tmp_path: Path) -> None:
    done = distill(options(stages="none", epochs=1), tmp_path / "out")
    assert {"ce", "ofa"} == {name for name in done.metrics[0] if is_part(name)}
    assert yaml.safe_load((tmp_path / "out" / "stages.yaml").read_text())["chosen"] == []


def test_a_student_learns_colours_from_its_teacher(options: Options, tmp_path: Path) -> None:
    done = distill(options(epochs=8, student=spec("tiny_cnn"), stages="last"), tmp_path / "out")
    assert done.teacher is not None
    assert done.teacher.top1 == 1
    assert done.accuracy.top1 > 0.9
    low, high = done.accuracy.interval()
    assert low < done.accuracy.top1 <= high


@pytest.mark.slow
def test_the_folder_of_a_run_holds_all_that_is_promised(options: Options, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = options(stages="auto", epochs=3, probe_epochs=1, rule="divergent", branches=1)
    done = distill(config, out, command="cka-probe distill ...")
    assert {path.name for path in out.iterdir()} == {
        ".cka-probe", "student.safetensors", "config.json", "metrics.csv", "stages.yaml", "run.yaml",
        "similarity.before.npz", "similarity.choice.npz", "similarity.after.npz",
    }  # fmt: skip
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["test_top1"]) == done.metrics[-1]["test_top1"]
    stages = yaml.safe_load((out / "stages.yaml").read_text())
    (chosen,) = stages["chosen"]
    assert rows[0][f"branch_{chosen}"] == ""
    assert float(rows[1][f"branch_{chosen}"]) > 0
    similarity = cp.Similarity.load(out / "similarity.choice.npz").between("tiny_vit", "teacher")
    scores = {row["layer"]: row["similarity"] for row in stages["stages"]}
    for layer, values in zip(similarity.rows, similarity.values, strict=True):
        assert scores[layer.name] == pytest.approx(np.nanmax(values))
    # After an epoch of training, round-off decides whether they differ by more than their errors on 32 images.
    decides = "similarity" if stages["scores_differ"] else "parameters"
    assert stages["stages"][chosen - 1][decides] == min(row[decides] for row in stages["stages"])
    record = yaml.safe_load((out / "run.yaml").read_text())
    assert record["result"]["top1"] == done.accuracy.top1
    assert record["options"]["epochs"] == 3
    assert not done.student.training
    torch.testing.assert_close(done.student.state_dict(), weights(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"stages": "auto", "probe_epochs": 1, "mixup": 0.4, "cutmix": 1.0, "erasing": 0.3}, 9),
        ({"method": "none", "teacher": None, "student": spec("tiny_cnn"), "ema": 0.9, "rand_augment": "rand-m5"}, 8),
        ({"method": "crd", "student": spec("tiny_cnn"), "accumulate": 2, "optimizer": "sgd"}, 3),
        ({"method": "fitnet", "stages": "auto", "epochs": 2}, 5),
        ({"method": "fbt", "teacher": spec("whole_teacher"), "cut": "auto", "validation": 0.2}, 8),
        (
            {
                "method": "fbt",
                "teacher": spec("whole_teacher"),
                "student": spec("tiny_cnn"),
                "accumulate": 2,
                "assistant": "teacher-first",
                "mixup": 0.4,
            },
            3,
        ),
    ],
    ids=["ofa auto", "none with an average", "crd with accumulation", "fitnet auto", "fbt auto", "fbt statistics"],
)
def test_a_killed_run_ends_in_the_same_bits_as_one_never_killed(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, steps: int
) -> None:
    config = options(**changes, checkpoint_minutes=0)
    whole = distill(config, tmp_path / "whole")
    killed_after(steps, monkeypatch, config, tmp_path / "killed")
    assert not (tmp_path / "killed" / "run.yaml").exists()
    torch.manual_seed(99)  # what the process did before does not count
    resumed = distill(config, tmp_path / "killed", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert {path.name for path in (tmp_path / "killed" / ".cka-probe").iterdir()} == {"lock", "manifest"}
    for one, other in zip(whole.metrics, resumed.metrics, strict=True):
        del one["images_per_second"], other["images_per_second"]
        assert one == other


@pytest.mark.full
def test_workers_change_nothing(options: Options, tmp_path: Path) -> None:
    for workers in (0, 2):
        distill(options(workers=workers, epochs=1, rand_augment="rand-m5", image_cache=1e-6), tmp_path / str(workers))
    assert_same(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = options(method="kd"), tmp_path / "killed"
    distill(config, tmp_path / "whole")
    killed_after(14, monkeypatch, config, out)
    content = bytearray((out / ".cka-probe" / "last.ckpt").read_bytes())
    for index in range(200):  # more than the padding between two tensors
        content[len(content) // 2 + index] ^= 0xFF
    (out / ".cka-probe" / "last.ckpt").write_bytes(content)
    with caplog.at_level("WARNING", "cka_probe"):
        distill(config, out, resume=True)
    assert "is damaged; going on from the checkpoint before it" in caplog.text
    assert_same(tmp_path / "whole", out)


@pytest.mark.slow
def test_both_checkpoints_damaged_is_an_error(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = options(method="kd"), tmp_path / "out"
    killed_after(14, monkeypatch, config, out)
    for name in ("last.ckpt", "previous.ckpt"):
        path = out / ".cka-probe" / name
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CkaProbeError, match="Start over with --overwrite"):
        distill(config, out, resume=True)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_options_and_not_overwritten_unasked(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = options(method="kd", epochs=2), tmp_path / "out"
    killed_after(8, monkeypatch, config, out)
    with pytest.raises(SpecError, match=r"lr was 0.003 and is 0.1"):
        distill(options(method="kd", epochs=2, lr=0.1), out, resume=True)
    with pytest.raises(OutputError, match="Add --resume to go on, or --overwrite"):
        distill(config, out)
    distill(config, out, resume=True)
    with pytest.raises(OutputError, match="holds a finished run"):
        distill(config, out)
    again = distill(config, out, resume=True)
    assert (again.accuracy.images, again.accuracy.top1) == (36, again.metrics[-1]["test_top1"])
    with pytest.raises(SpecError, match=r"lr was 0.003 and is 0.1"):
        distill(options(method="kd", epochs=2, lr=0.1), out, resume=True)
    (out / "notes.txt").write_text("mine")
    distill(options(method="none", epochs=1, teacher=None), out, overwrite=True)
    left = {path.name for path in out.iterdir()}
    assert "notes.txt" in left
    assert "similarity.before.npz" not in left, "of the run before"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, out = 0, tmp_path / "out"
    sound = losses.kd_loss

    def breaking(*args: Tensor, **given: float) -> Tensor:
        nonlocal calls
        calls += 1
        return sound(*args, **given) * (torch.nan if calls == 9 else 1)

    config = options(method="kd")
    with monkeypatch.context() as patched:
        patched.setattr(losses, "kd_loss", breaking)
        with pytest.raises(TrainingError, match="'kd' was not, in epoch 2") as caught:
            distill(config, out)
    assert "'ce'" not in str(caught.value), "its first step broke that part alone"
    distill(config, tmp_path / "whole")
    distill(config, out, resume=True)  # the last good checkpoint is there
    assert_same(tmp_path / "whole", out)


@pytest.mark.slow
def test_a_teacher_that_guesses_is_refused_before_the_first_step(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"must name at least 66.7% of the training images right"):
        distill(options(teacher=spec("ignorant")), tmp_path / "out")


def test_class_counts_must_agree(options: Options, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs a teacher with the 3 classes of the data, but .* has 5"):
        distill(options(teacher=spec("tiny_cnn") + ",num_classes=5"), tmp_path / "out")
    done = distill(
        options(method="none", teacher=None, student=spec("tiny_cnn") + ",num_classes=5", epochs=1), tmp_path / "new"
    )
    assert done.student(torch.zeros(2, 3, 16, 16)).shape == (2, 3), "a student gets a new classifier"


@pytest.mark.slow
def test_an_exported_student_is_loaded_by_plain_timm_and_by_its_spec(options: Options, tmp_path: Path) -> None:
    architecture = "test_vit,img_size=32"
    config = options(student=f"{architecture}@random:3", method="kd", epochs=1, ema=0.5)
    done = distill(config, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for network in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        cp.load_subject(f"{architecture}@{tmp_path / 'student.safetensors'}").network,
    ):
        with torch.no_grad():
            torch.testing.assert_close(network(images), done.student(images))


@pytest.mark.slow
def test_similarity_of_a_finished_comparison_decides_at_once(options: Options, colours: Path, tmp_path: Path) -> None:
    specs = [spec("tiny_vit"), spec("teacher")]
    similarity = cp.compare(specs, data=str(colours), examples=32, batch_size=8, workers=0)
    similarity.save(tmp_path / "similarity.npz")
    config = options(stages="auto", similarity=str(tmp_path), rule="aligned", branches=2, epochs=1)
    done = distill(config, tmp_path / "out")
    assert sum(name.startswith("branch_") for name in done.metrics[0]) == 2
    assert not (tmp_path / "out" / "similarity.choice.npz").exists()


@pytest.mark.slow
def test_progress_is_told_and_the_random_state_of_the_caller_kept(options: Options, tmp_path: Path) -> None:
    seen: list[Live] = []
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    distill(options(epochs=1), tmp_path / "out", progress=seen.append)
    assert (torch.rand(1), np.random.rand()) == expected
    assert seen[-1].seconds_left == 0
    assert seen[-1].images_per_second > 0
    assert "branch_4" in seen[-1].parts


@pytest.mark.slow
def test_bfloat16_and_channels_last_train(options: Options, tmp_path: Path) -> None:
    # Not tiny_cnn: PyTorch 2.15's bfloat16 weight gradient of a 3 x 3 convolution on 1 x 1 maps is not deterministic
    # on CPUs, nor always finite.
    done = distill(options(bf16=True, channels_last=True, epochs=2), tmp_path / "out")
    assert done.metrics[-1]["loss"] < done.metrics[0]["loss"]


TWO_PROCESSES = """
import sys
from pathlib import Path
from cka_probe.distill.config import from_record
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.training.train import distill
import yaml
options = yaml.safe_load(Path(sys.argv[1]).read_text())
done = distill(from_record(options), Path(sys.argv[2]))
if len(sys.argv) > 3:
    import os
    from safetensors.torch import save_file
    save_file(done.student.state_dict(), f"{sys.argv[3]}.{os.environ['RANK']}")
"""


def on_two_processes(config: Training, out: Path, *more: str) -> None:
    (out.parent / "options.yaml").write_text(yaml.safe_dump(as_record(config)))
    (out.parent / "two.py").write_text(TWO_PROCESSES)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(out.parent / "two.py"), str(out.parent / "options.yaml"), str(out), *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_of_two_processes_each_evaluates_the_average_that_is_exported(options: Options, tmp_path: Path) -> None:
    """Running statistics of batch norm are those of both processes, in the average of the weights too."""
    config = options(student=spec("tiny_cnn"), method="kd", epochs=1, batch_size=6, ema=0.5, validation=0.25)
    on_two_processes(config, tmp_path / "out", str(tmp_path / "student"))
    one, other = (load_file(tmp_path / f"student.{rank}") for rank in (0, 1))
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(one[name], tensor), name
        assert torch.equal(other[name], tensor), name
    assert (tmp_path / "out" / "best.safetensors").is_file()


@pytest.mark.full
def test_two_processes_train_as_one_does(options: Options, tmp_path: Path) -> None:
    """Half the batch each, and no batch norm or dropout: the same gradients up to round-off."""
    changes = {
        "student": spec("plain_vit"), "stages": "auto", "epochs": 2, "optimizer": "sgd", "lr": 0.05, "validation": 0.25,
    }  # fmt: skip
    distill(options(**changes, batch_size=12), tmp_path / "one")
    on_two_processes(options(**changes, batch_size=6), tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)  # float32 sums in another order
    rows = [list(csv.DictReader((tmp_path / which / "metrics.csv").open())) for which in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        assert float(first["loss"]) == pytest.approx(float(second["loss"]), rel=1e-4)
        assert float(first["train_top1"]) == pytest.approx(float(second["train_top1"]), abs=1 / 54)


@pytest.mark.slow
def test_a_result_is_returned(options: Options, tmp_path: Path) -> None:
    assert isinstance(distill(options(method="none", teacher=None, epochs=1), tmp_path / "out"), Distilled)
