"""What each measure is, for whoever reads its numbers: its name, its kind, and what its best value means.

The rooms after the measurement (results, findings, plots, report) look here, and load nothing heavy for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["similarity", "distance"]


@dataclass(frozen=True)
class Quantity:
    """A measure as a reader meets it.

    Attributes:
        name: for headings and axes.
        kind: a similarity is 1 for identical layers, a distance 0.
        paired: whether it sees which example of one side belongs to which of the other. One that does not compares
            two distributions, and is the same on shuffled examples.
        bounded_interval: whether its interval is made on Fisher's scale, arctanh, where a value near 1 scatters alike
            to both sides, and so stays below 1.
    """

    name: str
    kind: Kind = "similarity"
    paired: bool = True
    bounded_interval: bool = False

    @property
    def identical(self) -> float:
        """The value of a layer with itself."""
        return 0.0 if self.kind == "distance" else 1.0

    def closeness(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values on a scale that grows with the likeness: a distance with its sign turned."""
        return -values if self.kind == "distance" else values


QUANTITIES = {
    "cka": Quantity("linear CKA"),
    "cka-biased": Quantity("linear CKA"),
    "cka-rbf": Quantity("RBF CKA"),
    "rsa": Quantity("RSA", bounded_interval=True),
    "mantel": Quantity("Mantel r", bounded_interval=True),
    "mean-cca": Quantity("mean CCA", bounded_interval=True),
    "svcca": Quantity("SVCCA", bounded_interval=True),
    "pwcca": Quantity("PWCCA", bounded_interval=True),
    "procrustes": Quantity("Procrustes cosine", bounded_interval=True),
    "mutual-knn": Quantity("mutual k-NN", bounded_interval=True),
    "mmd": Quantity("MMD²", "distance", paired=False),
    "energy": Quantity("energy distance", "distance", paired=False),
    "wasserstein": Quantity("1-Wasserstein", "distance", paired=False),
}


def quantity(measure: str) -> Quantity:
    """What a measure is, by its name; a similarity between -1 and 1 where the name is not known."""
    return QUANTITIES.get(measure, Quantity(measure))
