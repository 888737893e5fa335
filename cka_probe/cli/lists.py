"""The commands that print lists: ``cka-probe layers``, ``measures`` and ``methods``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from tyro.conf import Positional, Suppress, arg

from cka_probe.probing.options import Selection
from cka_probe.runtime.ranges import flag
from cka_probe.runtime.terminal import print_result, visible

if TYPE_CHECKING:
    from cka_probe.distill.methods import Method


@dataclass(frozen=True)
class Layers:
    """List the layers of a network that --layers selects, with their shapes."""

    model: Annotated[Positional[str], arg(metavar="SPEC")]
    """As for compare."""

    selection: Selection = Selection()

    image_size: int | None = None
    """Height and width of the input. Default: the model's own."""

    def run(self, command: str) -> None:
        from cka_probe.probing.compare import list_layers

        chosen = list_layers(self.model, layers=self.selection.layers, image_size=self.image_size)
        width = max(len(visible(layer.name)) for layer in chosen)
        for layer in chosen:
            print_result(f"{visible(layer.name):{width}}  {' x '.join(map(str, layer.shape)):>18}  {layer.kind}")


@dataclass(frozen=True)
class Measures:
    """List the similarity measures and their options, for --measures."""

    def run(self, command: str) -> None:
        from cka_probe.measures.catalogue import listing

        print_result(
            "A spec is a name followed by its options in any order, separated by colons: cka-rbf:0.8:biased. The "
            "first word of each choice is the default."
        )
        _list(listing())


@dataclass(frozen=True)
class Methods:
    """List the distillation methods and their options, for --method."""

    def run(self, command: str) -> None:
        from cka_probe.distill.methods import METHODS

        _list(
            (name, [method.summary, f"Options: {_with_defaults(_shown_options(method))}"])
            for name, method in METHODS.items()
        )
        print_result("")
        print_result("What the options mean: cka-probe distill --method NAME --help")


def _with_defaults(options: Mapping[str, Any]) -> str:
    """Flags with their defaults, such as ``--kd-weight 1.0``."""
    return ", ".join(f"{flag(name)}{_as_argument(default)}" for name, default in options.items())


def _shown_options(method: type[Method]) -> dict[str, Any]:
    """The options of a method with their defaults, without those that it fixes."""
    from cka_probe.distill.config import method_options

    hints = get_type_hints(method, include_extras=True)
    return {name: value for name, value in method_options(method).items() if Suppress not in get_args(hints[name])}


def _as_argument(default: Any) -> str:
    """A default as one writes it behind its flag; nothing for a switch or an option that has no default."""
    if default is None or isinstance(default, bool) or default == ():
        return ""
    return f" {' '.join(map(str, default)) if isinstance(default, tuple) else default}"


def _list(entries: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Print names and, indented below each, what it is."""
    for name, texts in entries:
        print_result("")
        print_result(name)
        for text in texts:
            for line in textwrap.wrap(text, 96, break_on_hyphens=False):
                print_result(f"    {line}")
