"""Figures of papers: which models, measures and panels they put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cka_probe.errors import SpecError


@dataclass(frozen=True)
class Preset:
    """One figure.

    Attributes:
        models: specs that stand in where none are named.
        roles: what each of the models must be, for messages.
        measures: specs with commas between them.
        pairs: of the panels, by the models' numbers: the one along x, the one along y.
        columns: panels in a row.
    """

    models: tuple[str, ...]
    roles: str
    measures: str
    pairs: tuple[tuple[int, int], ...]
    columns: int

    def choose(self, models: Sequence[str]) -> tuple[str, ...]:
        """The models named, or those of the preset.

        Raises:
            SpecError: there are more or fewer than the figure has.
        """
        if models and len(models) != len(self.models):
            raise SpecError(
                f"This preset needs {len(self.models)} models ({self.roles}), or none, but got {len(models)}."
            )
        return tuple(models) or self.models

    def panels(self, names: Sequence[str]) -> dict[str, Any]:
        """The arrangement, for the models of these names."""
        return {"pairs": [[names[x], names[y]] for x, y in self.pairs], "columns": self.columns}


PRESETS = {
    # Hao et al. (2023), figure 1: pairs of one architecture above, pairs of two architectures below. Its estimator is
    # the biased one; the debiased one stands beside it.
    "ofa-fig1": Preset(
        models=("zoo:cnn", "zoo:cnn-2", "zoo:vit", "zoo:vit-2", "zoo:mlp", "zoo:mlp-2"),
        roles="a CNN, a ViT and an MLP, two trainings of each, side by side",
        measures="cka:biased,cka",
        pairs=((0, 1), (2, 3), (4, 5), (0, 2), (0, 4), (2, 4)),
        columns=3,
    ),
}
