"""What decides a teacher's outputs: the key of an entry of the cache."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cka_probe.distill.config import ELSEWHERE, Augmentation, DividedData, Training, TrainingRun
from cka_probe.distill.preparation import Prepared
from cka_probe.images.broken import broken_record
from cka_probe.runtime.devices import device_name
from cka_probe.runtime.provenance import versions
from cka_probe.runtime.world import World

_NO_PART = {*ELSEWHERE, "probe_examples", "teacher_cache_dtype", "device"}


def key_of(ready: Prepared, config: Training, world: World, made_of: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides what the teacher puts out in training, as plain values.

    Args:
        ready: networks and data.
        config: all options.
        world: the processes.
        made_of: hashes of the data and of the teacher's weights and code.
    """
    assert ready.teacher is not None
    teacher, student = ready.teacher.subject, ready.student.subject
    options = {field.name for group in (DividedData, Augmentation, TrainingRun) for field in fields(group)} - _NO_PART
    key = {
        "teacher": {
            "source": {name: str(value) for name, value in teacher.source.items()},
            "preprocessing": asdict(teacher.preprocessing),
        },
        "student_preprocessing": asdict(student.preprocessing),
        "made_of": {name: value for name, value in made_of.items() if "student" not in name},
        "broken": broken_record(ready.parts.broken),
        "options": {name: getattr(config, name) for name in sorted(options)},
        "batch_size": config.batch_size,
        "processes": world.size,
        "rank": world.rank,
        "device": device_name(world.device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "pillow": version("pillow")},
    }
    plain: dict[str, Any] = json.loads(json.dumps(key, default=str, sort_keys=True))
    return plain


def name_of(key: Mapping[str, Any]) -> str:
    """The name of the entry's folder: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


@cache
def processor() -> str:
    """The kind of processor, and the instructions that PyTorch uses there."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # another system than Linux
    return f"{platform.machine()} {model} {torch.backends.cpu.get_cpu_capability()}"
