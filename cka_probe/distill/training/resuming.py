"""What must be as it was when a run is resumed: its options, and what it is made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cka_probe.distill.config import COMMON, ELSEWHERE, Training, as_record, from_record, renewed
from cka_probe.distill.outputs.record import read_record
from cka_probe.errors import OutputError, SpecError
from cka_probe.images.parts import Parts, fingerprint
from cka_probe.networks.models import Subject
from cka_probe.probing.saved_state import fingerprint as weights_fingerprint
from cka_probe.runtime.folder.checkpoint import DISTILLATION, Which, load_checkpoint
from cka_probe.runtime.folder.run_folder import PRIVATE, RECORD, kind_of


def check_same(config: Training, before: Mapping[str, Any]) -> None:
    """Raise a SpecError where a run is resumed with other options than it was started with."""
    now, then = as_record(config), as_record(from_record(before))
    names = [name for name in {**now, **then} if name not in ELSEWHERE]
    if now["method"] != then["method"]:  # their own options say nothing beside that
        names = [name for name in names if name in COMMON]
    changed = [f"{name} was {then[name]!r} and is {now[name]!r}" for name in names if now[name] != then[name]]
    if changed:
        raise SpecError(
            f"A run is resumed with the options it was started with, but {'; '.join(changed)}. Give the same, or start "
            "over in another folder."
        )


def made_of(parts: Parts, student: Subject, teacher: Subject | None) -> dict[str, str]:
    """What a training is made from, by name a hash: what must be the same when it is resumed.

    Args:
        parts: training, validation and test images.
        student: its weights are in the checkpoint, its code is not.
        teacher: None without one.
    """
    found = {"the training images": fingerprint(parts.train), "the test images": fingerprint(parts.test)}
    if parts.validation is not None:
        found["the validation images"] = fingerprint(parts.validation)
    for role, subject in (("student", student), ("teacher", teacher)):
        if subject is not None and "code_sha256" in subject.source:
            found[f"the file of the {role}"] = str(subject.source["code_sha256"])
    if teacher is not None:
        found["the weights of the teacher"] = weights_fingerprint(teacher.network)
    return found


def check_made_of(now: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Raise a SpecError where what a training is made from has changed since it was started; see `made_of`."""
    changed = [what for what in {**before, **now} if before.get(what) != now.get(what)]
    if changed:
        raise SpecError(
            f"Changed since the run was started: {', '.join(changed)}. A run is resumed only with what it was started "
            "with: restore that, or start over in another folder."
        )


def resumed_config(config: Training, before: Mapping[str, Any] | None, given: Collection[str]) -> Training:
    """The options that a run goes on with: those it was started with, and those that the user gave.

    Args:
        config: all options, from the command line, recipe and defaults.
        before: the options of the run that is resumed; None where it starts.
        given: names of the options that the user gave, even if with the value of the default.

    Raises:
        OutputError: there is nothing to resume, and no student was named.
    """
    if before is None:
        if not config.student:
            raise OutputError(
                "There is no run to resume in --out, and without --student none can be started. Name the folder of a "
                "run that was started, or give all its options."
            )
        return config
    now = as_record(config)
    return from_record({**now, **renewed(before), **{name: now[name] for name in given if name in now}})


def options_before(path: Path, which: Which) -> Mapping[str, Any] | None:
    """The options of the distillation in a folder, finished or not; None where there is none."""
    if kind_of(path) != "distill":
        return None
    state = load_checkpoint(path / PRIVATE, DISTILLATION, which)
    if state is not None:
        options: Mapping[str, Any] = state["config"]
        return options
    return read_record(path).options if (path / RECORD).is_file() else None
