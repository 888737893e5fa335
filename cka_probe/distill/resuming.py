"""With which options a run goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from cka_probe.distill.config import ELSEWHERE, DistillConfig
from cka_probe.errors import OutputError, SpecError


def check_same(config: DistillConfig, before: Mapping[str, Any]) -> None:
    """Raise a SpecError where a run is resumed with other options than it was started with."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    changed = [
        f"{field.name} was {before.get(field.name)!r} and is {now[field.name]!r}"
        for field in fields(DistillConfig)
        if field.name not in ELSEWHERE and now[field.name] != before.get(field.name)
    ]
    if changed:
        raise SpecError(
            f"A run is resumed with the options it was started with, but {'; '.join(changed)}. Give the same, or start "
            "anew in another folder."
        )


def resumed_config(config: DistillConfig, before: Mapping[str, Any] | None, given: Collection[str]) -> DistillConfig:
    """The options that a run goes on with: those it was started with, and those that the user gave.

    Args:
        config: all options, from the command line, recipe and defaults.
        before: the options of the run that is resumed; None where it starts.
        given: names of the options that the user gave, be it with the value of the default.

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
    known = {field.name for field in fields(DistillConfig)}
    kept: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in before.items()
        if name in known and name not in given
    }
    return replace(config, **kept)
