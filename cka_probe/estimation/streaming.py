"""CKA over minibatches: the layers of two subjects in one product a batch, and the sums that all values come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.estimation.estimates import Estimates, Point, p_values
from cka_probe.estimation.gram import Features
from cka_probe.estimation.kernels import center
from cka_probe.estimation.measure import Setup
from cka_probe.estimation.resampling import LeftOut, PermutedSums, generator_of
from cka_probe.runtime.devices import DeferredRead
from cka_probe.runtime.world import World

_ROUND_OFF = 1e-6
"""Of centered Gram matrices whose entries were computed in float32, relative: see
`cka_probe.estimation.kernels.center`."""

_CHUNK_BYTES = 1 << 22  # of Gram matrices centered at a time on a CPU: they stay in its cache
_GPU_CHUNK_BYTES = 1 << 28


class Kernel(Protocol):
    """What turns the features of a layer into a Gram matrix, (n, n) float32 or float64."""

    def gram(self, layer: int, features: Features) -> Tensor: ...

    def details(self) -> dict[str, Any]: ...

    def settled(self) -> Any: ...

    def settle(self, state: Any) -> None: ...


class StreamingCKA:
    """CKA of any number of layers, one batch at a time. Memory does not grow with the batches.

    Args:
        setup: the layers, and what is wanted: permutations are within each batch, the curve is noted at the ends of
            batches.
        kernel: makes the Gram matrices.
        debiased: U-center them (Song et al. 2012), else double-center them (Gretton et al. 2005).
    """

    def __init__(self, setup: Setup, kernel: Kernel, *, debiased: bool) -> None:
        self._labels, seed, requests = setup.labels, setup.seed, setup.requests
        self._kernel = kernel
        self._debiased = debiased
        self._seed = seed
        self._grams: dict[int, Tensor] = {}
        self._sizes = requests.curve
        self._sums: dict[int, HsicSums] = {}  # of the batches between two points of the curve, so that all of it adds
        self._groups = requests.groups
        self._tested = PermutedSums(seed, requests.permutations) if requests.permutations else None
        self._left_out = LeftOut(debiased=debiased) if requests.influence else None
        self._workspace: _Workspace | None = None
        self._later = DeferredRead()

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way. Runs inside the forward hook."""
        self._grams[layer] = self.gram(layer, features)

    def gram(self, layer: int, features: Features) -> Tensor:
        """The Gram matrix of a layer, (n, n) float32 or float64, before it is centered."""
        return self._kernel.gram(layer, features)

    def update(self, first: int) -> None:
        """Add the batch, once every layer was prepared. Batches may come in any order.

        Args:
            first: the number of its first example.

        Raises:
            FeatureError: the features of a layer are not finite; on a GPU, those of the batch before.
        """
        self.add([self._grams.pop(layer) for layer in range(len(self._labels))], first)

    def add(self, grams: Sequence[Tensor], first: int) -> None:
        """Add a batch, from what `gram` made of each layer. Arguments and errors as for `update`.

        The matrices are looked at a few at a time, and may be read from a file when they are.
        """
        n, device = len(grams[0]), grams[0].device
        if self._workspace is None or self._workspace.examples != n:
            self._workspace = None  # its memory first, so that there are never two
            self._workspace = _Workspace(len(grams), n, device)
        order = torch.randperm(n, generator=generator_of(self._seed, first, 0)).to(device, non_blocking=True)
        triangles = self._workspace.triangles(grams, order, debiased=self._debiased)
        self._later.read(torch.isfinite(triangles[0].sum(1)), self._check_finite)
        point = sum(size <= first for size in self._sizes)
        if point not in self._sums:
            self._sums[point] = HsicSums.zeros(len(grams), device)
        self._sums[point].add(triangles, n, self._groups)
        if self._tested is not None:
            self._tested.add(triangles[0], first)
        if self._left_out is not None:
            self._left_out.add(triangles[0], first)

    def settle(self, world: World) -> None:
        """Take over what rank 0's first batch has decided: the kernel's bandwidths."""
        self._kernel.settle(world.from_first(self._kernel.settled()))

    def merge(self, world: World) -> None:
        """Add what all processes have into rank 0's sums, and start from zero on the others."""
        self._later.finish()
        layers = len(self._labels)
        for point in range(len(self._sizes) + 1):
            own = self._sums.pop(point, None) or HsicSums.zeros(layers, world.device)
            sums = own.merged(world)
            if sums.batches:
                self._sums[point] = sums
        if self._tested is not None:
            self._tested.merge(world, layers)
        if self._left_out is not None:
            self._left_out.merge(world)

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs to go on from here."""
        self._later.finish()
        return {
            "kernel": self._kernel.settled(),
            "sums": {point: vars(sums) for point, sums in self._sums.items()},
            "permuted": self._tested.sums if self._tested is not None else None,
            "left_out": self._left_out.by_batch if self._left_out is not None else None,
        }

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Go on from what `state` gave."""
        self._kernel.settle(state["kernel"])
        for point, parts in state["sums"].items():
            moved: Any = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
            self._sums[point] = HsicSums(**moved)
        if self._tested is not None:
            self._tested.sums = state["permuted"].to(device)
        if self._left_out is not None:
            self._left_out.by_batch = dict(state["left_out"])

    def compute(self) -> Estimates:
        """The estimates over all batches so far."""
        assert self._sums, "compute() before update()"
        self._later.finish()
        curve = []
        *_, sums = so_far = list(accumulate(self._sums[point] for point in sorted(self._sums)))
        for reached in so_far if self._sizes else ():
            parts = (part.cpu().numpy() for part in (reached.values(), reached.std_error()))
            curve.append(Point(reached.examples, *parts))
        details = {"debiased": self._debiased, "batches": sums.batches, **self._kernel.details()}
        p_value = p_value_max = None
        if self._tested is not None:
            values = sums.values().cpu().numpy()
            p_value, p_value_max = p_values(values, self._tested.ratios(sums.norm()), self._groups)
            details["permutations"] = self._tested.permutations
        influence = self._left_out.changes(sums.cross) if self._left_out is not None else None
        return Estimates(
            sums.values(), sums.std_error(), sums.control(), details, p_value, p_value_max, curve, influence,
            sums.effective_batches(),
        )  # fmt: skip

    def _check_finite(self, finite: list[bool]) -> None:
        broken = [label for label, is_finite in zip(self._labels, finite, strict=True) if not is_finite]
        if broken:
            raise not_finite(broken)


def _products(triangles: Tensor, groups: Sequence[int]) -> Iterator[Tensor]:
    """Twice the inner products of all pairs of layers, and those with the second one shuffled.

    Each pair of subjects has a product of its own: how a product adds depends on its shape, so that a third subject
    would change the last digits of a pair. Within it, one product serves both, as it is memory that takes the time.
    """
    layers = triangles.shape[1]
    found = triangles.new_empty(2, layers, layers)
    ends = [end for end in range(1, layers) if groups[end] != groups[end - 1]]
    spans = [slice(*ends) for ends in zip([0, *ends], [*ends, layers], strict=True)]
    for rows in spans:
        for columns in spans:
            product = 2 * (triangles[0, rows] @ triangles[:, columns].flatten(0, 1).T)
            found[:, rows, columns] = torch.stack(product.chunk(2, dim=1))
    return iter(found)


def not_finite(labels: Sequence[str]) -> FeatureError:
    """The error that the features of these layers are not finite."""
    others = f" (and those of {len(labels) - 1} more layers)" if len(labels) > 1 else ""
    return FeatureError(
        f"The features of every layer must be finite, but those of {labels[0]} hold NaN or infinity{others}. "
        "Check the weights and the preprocessing of that model, or select other layers."
    )


class _Workspace:
    """The lower triangles of centered Gram matrices: half of a symmetric matrix says all.

    Its memory is kept from batch to batch: to allocate so much again takes longer than to fill it.
    """

    def __init__(self, layers: int, examples: int, device: torch.device) -> None:
        self.examples = examples
        self._row, self._column = torch.tril_indices(examples, examples, device=device)
        self._triangles = torch.empty(2, layers, len(self._row), dtype=torch.float64, device=device)
        chunk_bytes = _CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES
        at_once = min(layers, max(1, chunk_bytes // (8 * examples**2)))
        self._chunk = torch.empty(at_once, examples, examples, dtype=torch.float64, device=device)

    def triangles(self, grams: Sequence[Tensor], order: Tensor, *, debiased: bool) -> Tensor:
        """Those of the centered matrices, and of these in another order, (2, layers, n (n + 1) / 2) float64.

        The diagonal is multiplied by √½, so that twice the inner product of two triangles is that of the matrices.
        """
        straight = self._row * self.examples + self._column
        shuffled = order[self._row] * self.examples + order[self._column]
        for first in range(0, len(grams), len(self._chunk)):
            some = grams[first : first + len(self._chunk)]
            chunk = self._chunk[: len(some)]
            for matrix, gram in zip(chunk, some, strict=True):
                matrix.copy_(gram)
            center(chunk, debiased=debiased, tolerance=_ROUND_OFF, overwrite=True)
            chunk.diagonal(dim1=-2, dim2=-1).mul_(0.5**0.5)
            for where, found in zip((straight, shuffled), self._triangles, strict=True):
                # gather() takes a quarter of the time of indexing.
                torch.gather(chunk.flatten(1), 1, where.expand(len(some), -1), out=found[first : first + len(some)])
        return self._triangles


@dataclass
class HsicSums:
    """Sums over batches of the inner products of all pairs of centered Gram matrices. They merge by addition.

    With N_b the (layers, layers) inner products of batch b and A_b, B_b its self terms (the diagonal), Nguyen et al.
    (2021, eq. 4) put CKA = Σ N_b / √(Σ A_b · Σ B_b): a ratio of sums. The factor 1/(n (n - 3)) of HSIC is left out, so
    that a shorter last batch counts for less.

    Attributes:
        cross: Σ N_b, (layers, layers) float64; so are the others.
        cross_squared: Σ N_b².
        cross_self: Σ N_b,ij · N_b,ii.
        self_self: Σ N_b,ii · N_b,jj.
        shuffled: Σ N_b with the rows of the second layer permuted.
        batches: how many batches were added.
        examples: how many these held.
    """

    cross: Tensor
    cross_squared: Tensor
    cross_self: Tensor
    self_self: Tensor
    shuffled: Tensor
    batches: int = 0
    examples: int = 0

    @classmethod
    def zeros(cls, layers: int, device: torch.device) -> HsicSums:
        """The sums over no batch."""
        a, b, c, d, e = torch.zeros(5, layers, layers, dtype=torch.float64, device=device)
        return cls(a, b, c, d, e)

    def __add__(self, other: HsicSums) -> HsicSums:
        """The sums over the batches of both."""
        return HsicSums(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def merged(self, world: World) -> HsicSums:
        """The sums over the batches of all processes, on rank 0; over none elsewhere."""
        sums = torch.stack([self.cross, self.cross_squared, self.cross_self, self.self_self, self.shuffled])
        counts = torch.tensor([self.batches, self.examples], dtype=torch.float64, device=world.device)
        for part in (sums, counts):
            world.sum_to_first(part)
        a, b, c, d, e = sums
        batches, examples = counts.long().tolist()
        return HsicSums(a, b, c, d, e, batches, examples)

    def add(self, triangles: Tensor, examples: int, groups: Sequence[int] = ()) -> None:
        """Add a batch.

        Args:
            triangles: (2, layers, n (n + 1) / 2) float64: the lower triangles of the centered Gram matrices, and those
                of the examples in another order, for the control, their diagonals multiplied by √½.
            examples: n.
            groups: for each layer, the number of its subject, those of one side by side; all of one where empty.
        """
        cross, shuffled = _products(triangles, groups or [0] * triangles.shape[1])
        own = cross.diagonal()
        self.cross += cross
        self.cross_squared += cross**2
        self.cross_self += cross * own[:, None]
        self.self_self += own[:, None] * own[None, :]
        self.shuffled += shuffled
        self.batches += 1
        self.examples += examples

    def values(self) -> Tensor:
        """CKA, (layers, layers); NaN in the row and column of a layer whose own sum is 0."""
        return self.cross / self.norm()

    def control(self) -> Tensor:
        """CKA of the first layer with the second on shuffled examples, (layers, layers)."""
        return self.shuffled / self.norm()

    def std_error(self) -> Tensor:
        """The standard error of `values`, (layers, layers), by its influence function; NaN for one batch.

        The influence of batch b on R = N/√(AB) is e_b = N_b/√(AB) - R · (A_b/A + B_b/B)/2, and the squared error
        m/(m - 1) · Σ e_b² over m batches. Written out, it needs the stored sums alone.
        """
        if self.batches < 2:
            return torch.full_like(self.cross, torch.nan)
        norm, ratio, own = self.norm(), self.values(), self.cross.diagonal()
        by_first = self.cross_self / own[:, None]
        relative = self.self_self / (own[:, None] * own[None, :])
        each = self.self_self.diagonal() / own**2
        influence = (
            self.cross_squared / norm**2
            - ratio / norm * (by_first + by_first.T)
            + ratio**2 / 4 * (each[:, None] + each[None, :] + 2 * relative)
        )
        squared = influence.clamp_min(0) * self.batches / (self.batches - 1)  # round-off alone is below 0
        squared.diagonal()[own > 0] = 0  # that of a layer with itself, which is 1 in every sample
        return squared.sqrt()

    def effective_batches(self) -> Tensor:
        """How many equal batches hold as much, (layers, layers): 1/Σ w² with w = (A_b/A + B_b/B)/2 of each batch.

        It is the number of batches where all weigh the same, and less where a few dominate the sums, as they do of
        features with heavy tails, or where the last batch is short.
        """
        own = self.cross.diagonal()
        relative = self.self_self / (own[:, None] * own[None, :])
        each = self.self_self.diagonal() / own**2
        return 4 / (each[:, None] + each[None, :] + 2 * relative)

    def norm(self) -> Tensor:
        """√(Σ A_b · Σ B_b), (layers, layers); NaN in the row and column of a layer whose own sum is 0."""
        own = self.cross.diagonal().sqrt()
        norm = own[:, None] * own[None, :]
        return torch.where(norm > 0, norm, torch.nan)
