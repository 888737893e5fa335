"""Help is running text: a line of the source does not end a line of the help."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from cka_probe.cli.help_texts import join_lines
from cka_probe.cli.main import main


@dataclass
class Group:
    inner: int = 0
    """Of a group: the first line
    (3,2) and the second."""


@dataclass
class Command:
    group: Group
    """Some options."""
    own: int = 0
    """One
    1 line."""


def test_lines_are_joined_in_a_command_and_its_groups() -> None:
    join_lines(Command)
    texts = {field.name: field.metadata["help"] for kind in (Command, Group) for field in fields(kind)}
    assert texts == {
        "group": "Some options.",
        "own": "One 1 line.",
        "inner": "Of a group: the first line (3,2) and the second.",
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", [["compare"], ["distill", "--method", "fbt"], ["evaluate"], ["extract"]])
def test_every_command_prints_its_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "--data STR" in capsys.readouterr().out
