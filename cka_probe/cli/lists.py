"""The commands that print lists: ``cka-probe layers``, ``measures`` and ``methods``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from cka_probe.probing.options import Selection
from cka_probe.runtime.terminal import print_result, visible


@dataclass(frozen=True)
class Layers:
    """List the layers that a selection picks, with their shapes."""

    model: Annotated[Positional[str], arg(metavar="SPEC")]
    """As for compare."""

    selection: Selection = Selection()

    image_size: int | None = None
    """Height and width, in place of the model's own."""

    def run(self, command: str) -> None:
        from cka_probe.probing.compare import list_layers

        chosen = list_layers(self.model, layers=self.selection.layers, image_size=self.image_size)
        width = max(len(visible(layer.name)) for layer in chosen)
        for layer in chosen:
            print_result(f"{visible(layer.name):{width}}  {' x '.join(map(str, layer.shape)):>18}  {layer.kind}")


@dataclass(frozen=True)
class Measures:
    """List the measures of similarity and their options, as --measures takes them."""

    def run(self, command: str) -> None:
        from cka_probe.measures.catalogue import listing

        print_result(
            "A spec is a name and its options, in any order, with colons between them: cka-rbf:0.8:biased. The first "
            "word of each choice is the default."
        )
        _list(listing())


@dataclass(frozen=True)
class Methods:
    """List the methods of distillation, as --method takes them."""

    def run(self, command: str) -> None:
        from cka_probe.distill.methods import METHODS

        _list((name, [method.summary]) for name, method in METHODS.items())


def _list(entries: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Print names and, indented below each, what it is."""
    for name, texts in entries:
        print_result("")
        print_result(name)
        for text in texts:
            for line in textwrap.wrap(text, 96):
                print_result(f"    {line}")
