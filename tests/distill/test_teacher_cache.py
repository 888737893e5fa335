"""A teacher's outputs, stored once: the same bits as without, and never those of another teacher, data or setting."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cka_probe.distill.config import Training, as_record
from cka_probe.distill.teacher_cache.cache import Output, TeacherCache, checksum
from cka_probe.distill.teacher_cache.records import DIGEST, Records
from cka_probe.distill.training.step import TrainingStep
from cka_probe.distill.training.train import distill
from cka_probe.errors import OutputError, SpecError
from tests.distill.conftest import spec

Options = Callable[..., Training]

STEPS = 2 * 6
"""Of two epochs of the small runs."""


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of each of the teacher's forward passes in training."""
    found: list[int] = []
    whole = TrainingStep._taught

    def counting(self: TrainingStep, images: torch.Tensor) -> Any:
        found.append(len(images))
        return whole(self, images)

    monkeypatch.setattr(TrainingStep, "_taught", counting)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "kd"},
        {"method": "ofa", "stages": "last", "bf16": True, "mixup": 0.4, "cutmix": 1.0, "erasing": 0.3},
        pytest.param({"method": "rsd", "rand_augment": "rand-m5", "accumulate": 2}, marks=pytest.mark.full),
        pytest.param(
            {"method": "fbt", "student": spec("tiny_cnn"), "teacher": spec("whole_teacher")}, marks=pytest.mark.full
        ),
        {"method": "crd", "teacher_cache_dtype": "float16"},
    ],
    ids=["kd", "ofa", "rsd", "fbt", "crd in float16"],
)
def test_a_run_with_the_cache_equals_one_without(
    options: Options, tmp_path: Path, passes: list[int], changes: dict[str, Any]
) -> None:
    whole = {"epochs": 2, **changes}
    plain = {name: value for name, value in whole.items() if name != "teacher_cache_dtype"}
    done = distill(options(**plain), tmp_path / "plain")
    for name in ("first", "second"):
        passes.clear()
        again = distill(options(**whole, teacher_cache=str(tmp_path / "cache")), tmp_path / name)
        in_training = [images for images in passes if images == 12]
        assert len(in_training) == (STEPS if name == "first" else 0)
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    if "teacher_cache_dtype" not in changes:
        assert weights(tmp_path / "plain") == weights(tmp_path / "first")
        assert (again.accuracy, again.teacher) == (done.accuracy, done.teacher)


@pytest.mark.slow
def test_methods_share_what_they_both_need(options: Options, tmp_path: Path, passes: list[int]) -> None:
    cache = str(tmp_path / "cache")
    distill(options(method="kd", epochs=2, teacher_cache=cache), tmp_path / "kd")
    passes.clear()
    distill(options(method="dkd", epochs=2, teacher_cache=cache, student=spec("tiny_cnn")), tmp_path / "dkd")
    assert 12 not in passes


CHANGED: list[dict[str, Any]] = [
    {"seed": 1},
    {"batch_size": 8},
    {"crop_scale": (0.5, 1.0)},
    {"flip": 0.4},
    {"erasing": 0.1},
    {"mixup": 0.1},
    {"bf16": True},
    {"validation": 0.25},
    {"image_size": 24},
    {"teacher": spec("whole_teacher")},
    {"channels_last": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CHANGED, ids=lambda changes: next(iter(changes)))
def test_what_changes_the_values_is_another_entry(
    options: Options, tmp_path: Path, passes: list[int], changes: dict[str, Any]
) -> None:
    cache = tmp_path / "cache"
    student = spec("tiny_cnn" if "image_size" in changes else "plain_vit")
    small = {"method": "kd", "epochs": 1, "student": student, "teacher_cache": str(cache)}
    distill(options(**small), tmp_path / "one")
    passes.clear()
    distill(options(**small, **changes), tmp_path / "other")
    assert len([images for images in passes if images > 2]) >= 4
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_an_image_that_changed_behind_its_name_is_not_taken_from_the_cache(
    options: Options, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint of a large data set is of a hundred images; the checksum of a step is of its own."""
    from cka_probe.distill.training import resuming

    monkeypatch.setattr(resuming, "fingerprint", lambda images: "the same")
    small = {"method": "kd", "epochs": 1, "teacher_cache": str(tmp_path / "cache")}
    distill(options(**small), tmp_path / "one")
    passes.clear()
    from cka_probe.distill.training.pipeline import TrainingImages

    whole = TrainingImages._loaded

    def brighter(self: TrainingImages, *args: Any, **more: Any) -> Any:
        for number, batch in enumerate(whole(self, *args, **more)):
            if number == 3:
                batch.images[0, 0, 0, 0] ^= 1
            yield batch

    monkeypatch.setattr(TrainingImages, "_loaded", brighter)
    distill(options(**small), tmp_path / "other")
    assert [images for images in passes if images == 12] == [12]


@pytest.mark.slow
def test_a_damaged_or_half_written_record_is_computed_again(
    options: Options, tmp_path: Path, passes: list[int]
) -> None:
    small = {"method": "kd", "epochs": 2, "teacher_cache": str(tmp_path / "cache")}
    distill(options(**small), tmp_path / "one")
    first, second = sorted((tmp_path / "cache").rglob("epoch-*.bin"))
    content = bytearray(first.read_bytes())
    content[5] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-3])
    passes.clear()
    distill(options(**small), tmp_path / "two")
    assert len([images for images in passes if images == 12]) == 2
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.full
def test_two_runs_at_once_and_one_that_was_killed(options: Options, tmp_path: Path) -> None:
    program = (
        "import sys, yaml\nfrom pathlib import Path\nfrom cka_probe.distill.config import from_record\n"
        "from cka_probe.distill.training.train import distill\n"
        "distill(from_record(yaml.safe_load(Path(sys.argv[1]).read_text())), sys.argv[2])\n"
    )
    config = options(method="kd", epochs=4, teacher_cache=str(tmp_path / "cache"))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(as_record(config)))
    runs = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path / "options.yaml", tmp_path / name], env=None)
        for name in ("one", "two", "killed")
    ]
    while not list((tmp_path / "cache").rglob("epoch-*.bin")):
        assert runs[2].poll() is None
    runs[2].kill()
    assert [run.wait(240) for run in runs[:2]] == [0, 0]
    plain = distill(options(method="kd", epochs=4), tmp_path / "plain")
    assert plain.wrote
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "none", "teacher": None}, "--teacher-cache needs a teacher, but --method none has none"),
        ({"teacher_cache": None, "teacher_cache_dtype": "float16"}, "--teacher-cache-dtype is for --teacher-cache"),
        ({"method": "fitnet"}, "needs all positions of stages.0, stages.1, stages.2 and stages.3 of the teacher"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    options: Options, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        distill(options(**{"teacher_cache": str(tmp_path / "cache"), **changes}), tmp_path / "out")


def test_a_users_files_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    key = {"teacher": "a"}
    entry = TeacherCache(tmp_path, key).folder
    (entry / "key.json").unlink()
    (entry / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="must be an entry of a teacher cache, but holds other files"):
        TeacherCache(tmp_path, key)
    (entry / "key.json").write_text("mine too")
    with pytest.raises(OutputError, match="must hold the key of this entry, but holds another one"):
        TeacherCache(tmp_path, key)
    assert (entry / "key.json").read_text() == "mine too"
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be kept in"):
        TeacherCache(tmp_path / "file", key)


def test_a_disk_without_room_is_refused_before_the_training(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, {"teacher": "a"})
    huge = Output("logits", (10**6, 10**6), torch.float32, torch.float32)
    with pytest.raises(OutputError, match="need .* more in .* --teacher-cache-dtype float16"):
        cache.expect([huge], steps=1000, epochs=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_keep_their_bits_and_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = TeacherCache(tmp_path, {"teacher": "a"})
    outputs = [Output("logits", (4, 3), dtype, dtype), Output("pooled layer[1]:0", (4, 5), dtype, dtype)]
    cache.expect(outputs, steps=2, epochs=3)
    values = [torch.randn(output.shape).to(dtype) for output in outputs]
    assert cache.read(2, 1, b"abcd") is None
    assert all(torch.equal(one, other) for one, other in zip(cache.write(2, 1, b"abcd", values), values, strict=True))
    found = cache.read(2, 1, b"abcd")
    assert found is not None
    assert all(one.dtype == dtype and torch.equal(one, other) for one, other in zip(found, values, strict=True))
    assert cache.read(2, 1, b"other") is cache.read(2, 0, b"abcd") is cache.read(1, 1, b"abcd") is None
    assert (cache.read_steps, cache.computed_steps) == (1, 4)


def test_half_precision_is_rounded_alike_when_computed_and_when_read(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, {"teacher": "a"})
    cache.expect([Output("logits", (4, 3), torch.float16, torch.float32)], steps=1, epochs=1)
    value = torch.randn(4, 3)
    (given,), found = cache.write(0, 0, b"", [value]), cache.read(0, 0, b"")
    assert found is not None
    assert torch.equal(given, found[0])
    assert torch.equal(given, value.half().float())


def test_records_may_be_written_in_any_order(tmp_path: Path) -> None:
    records = Records(tmp_path / "logits", 4)
    records.write(0, 5, b"", b"five")
    records.write(0, 2, b"", b"two.")
    assert [bytes(records.read(0, step, b"") or b"") for step in (0, 2, 5, 6)] == [b"", b"two.", b"five", b""]
    assert records.stored == 6 * (4 + DIGEST)


@pytest.mark.slow
def test_the_key_can_be_read(options: Options, tmp_path: Path) -> None:
    distill(options(method="kd", epochs=1, teacher_cache=str(tmp_path / "cache")), tmp_path / "out")
    (path,) = (tmp_path / "cache").glob("*/key.json")
    key = json.loads(path.read_text())
    assert key["options"]["seed"] == 0
    assert set(key["versions"]) >= {"torch", "torchvision", "timm", "numpy", "pillow"}


def test_the_checksum_is_of_all_pixels() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    other = images.clone()
    other[1, 2, 4, 3] ^= 1
    assert checksum(images) == checksum(images.clone()) != checksum(other)
