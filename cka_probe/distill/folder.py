"""The folder of a run: who may write into it, and with which options a run there goes on."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from cka_probe.checkpoint import load_checkpoint
from cka_probe.distill import outcome
from cka_probe.distill.config import ELSEWHERE, DistillConfig
from cka_probe.errors import OutputError, SpecError
from cka_probe.run_directory import check_vacant


def claim(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of the run, or check that it may be used.

    Raises:
        OutputError: it holds something that was not to be replaced, or cannot be written.
    """
    finished = (out / "run.yaml").exists()
    if resume and finished:
        raise OutputError(f"{out} holds a finished run, which cannot go on. Start anew with --overwrite.")
    unfinished = (out / "last.ckpt").exists() or (out / "previous.ckpt").exists()
    if unfinished and not finished and not resume and not overwrite:
        raise OutputError(f"{out} holds a run that is not finished. Add --resume to go on, or --overwrite.")
    check_vacant(out, overwrite=overwrite or resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    if resume:
        outcome.clear_unfinished(out)
    else:
        outcome.clear(out)


def release(out: Path) -> None:
    """Leave nothing behind of a run that ended before its first checkpoint; one that can go on is left as it is."""
    if (out / "last.ckpt").exists() or (out / "previous.ckpt").exists():
        return
    outcome.clear(out)
    with suppress(OSError):  # it holds files of another's, or is not there
        out.rmdir()


def check_same(config: DistillConfig, before: dict[str, Any]) -> None:
    """Raise a SpecError where a run is resumed with other options than it was started with."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    changed = [
        f"{field.name} was {before.get(field.name)!r} and is {now[field.name]!r}"
        for field in fields(DistillConfig)
        if field.name not in ELSEWHERE and now[field.name] != before.get(field.name)
    ]
    if changed:
        raise SpecError(f"A run is resumed with the options it was started with, but {'; '.join(changed)}.")


def resumed_config(out: Path, base: DistillConfig) -> DistillConfig:
    """The options that the run in ``out`` was started with, but those of ``base`` that are not the defaults.

    Raises:
        OutputError: there is none to resume.
    """
    state = load_checkpoint(out)
    if state is None:
        raise OutputError(f"--resume needs the folder of a run that was started, but {out} holds no checkpoint.")
    before: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()}
    given = {
        field.name: getattr(base, field.name)
        for field in fields(DistillConfig)
        if field.name != "student" and getattr(base, field.name) != field.default
    }
    return replace(base, **(before | given))
