"""Help texts as running text: tyro keeps the line breaks of the source where a line is indented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import get_args, get_type_hints

HELP = ("-h", "--help")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for its help."""
    return any(argument in HELP for argument in arguments)


def join_lines(options: type) -> None:
    """Give each field of a dataclass, and of those that it holds, the text below it as one line, as its help.

    Args:
        options: of a command.
    """
    from docstring_parser import parse_from_object

    texts: dict[str, str] = {}
    for base in reversed(options.__mro__):
        if is_dataclass(base):
            found = parse_from_object(base).params
            texts |= {entry.arg_name: " ".join(entry.description.split()) for entry in found if entry.description}
    for field in fields(options):
        if field.name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})
    for hint in get_type_hints(options).values():
        for held in (hint, *get_args(hint)):
            if isinstance(held, type) and is_dataclass(held):
                join_lines(held)
