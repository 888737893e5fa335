"""What streaming CKA keeps beside its sums where it is asked to: permuted sums, and sums without one example each."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.runtime.world import World


def generator_of(*key: int) -> torch.Generator:
    """Random numbers that follow from the key alone: whoever has a batch, and whenever, draws the same for it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class PermutedSums:
    """The sums of inner products for each of many permutations of the second layer's examples, within batches.

    Args:
        seed: of the permutations.
        permutations: how many.

    Attributes:
        sums: (permutations, layers, layers) float64; None before the first batch.
    """

    def __init__(self, seed: int, permutations: int) -> None:
        self.permutations = permutations
        self._seed = seed
        self.sums: Tensor | None = None

    def add(self, triangles: Tensor, first: int) -> None:
        """Add a batch.

        Args:
            triangles: the lower triangles of its centered Gram matrices, as `StreamingCKA` makes them.
            first: the number of its first example.
        """
        layers, n = len(triangles), _examples(triangles)
        generator = generator_of(self._seed, first, 1)  # others than those of the control
        if self.sums is None:
            self.sums = torch.zeros(self.permutations, layers, layers, dtype=torch.float64, device=triangles.device)
        row, col = torch.tril_indices(n, n, device=triangles.device)
        for sums in self.sums:
            order = torch.randperm(n, generator=generator).to(triangles.device, non_blocking=True)
            larger, smaller = torch.maximum(order[row], order[col]), torch.minimum(order[row], order[col])
            moved = torch.index_select(triangles, 1, larger * (larger + 1) // 2 + smaller)
            sums += 2 * (triangles @ moved.T)

    def merge(self, world: World, layers: int) -> None:
        """Add what all processes have into rank 0's sums, and start from zero on the others."""
        if self.sums is None:
            self.sums = torch.zeros(self.permutations, layers, layers, dtype=torch.float64, device=world.device)
        world.sum_to_first(self.sums)

    def ratios(self, norm: Tensor) -> NDArray[np.float64]:
        """CKA under each permutation, (permutations, layers, layers).

        Args:
            norm: (layers, layers): what the sums are divided by, the same under every permutation.
        """
        assert self.sums is not None, "ratios() before add()"
        return np.asarray((self.sums / norm).cpu().numpy())


class LeftOut:
    """By how much each example raises CKA: its value less that without the example, exact, from the same products.

    With A and B the centered Gram matrices of a batch of n and aᵢ, bᵢ their rows, leaving example i out and centering
    again changes ⟨A, B⟩ by -2 (n - 2)/(n - 3) · aᵢ·bᵢ where they are U-centered, and by
    -2 n/(n - 1) · aᵢ·bᵢ + n²/(n - 1)² · Aᵢᵢ Bᵢᵢ where they are doubly centered. The RBF bandwidth stays.

    Args:
        debiased: whether they are U-centered.

    Attributes:
        by_batch: the number of a batch's first example -> the changes of its products, (n, layers, layers) float32.
    """

    def __init__(self, *, debiased: bool) -> None:
        self._debiased = debiased
        self.by_batch: dict[int, Tensor] = {}

    def add(self, triangles: Tensor, first: int) -> None:
        """Add a batch, as `PermutedSums.add`."""
        n = _examples(triangles)
        whole = torch.zeros(len(triangles), n * n, dtype=triangles.dtype, device=triangles.device)
        row, col = torch.tril_indices(n, n, device=triangles.device)
        whole[:, row * n + col] = triangles
        grams = whole.view(-1, n, n)
        grams = grams + grams.mT
        grams.diagonal(dim1=1, dim2=2).mul_(0.5**0.5)  # which stands in the triangles times √½, and twice in the sum
        rows = grams.transpose(0, 1)  # (n, layers, n)
        products = rows @ rows.mT
        if self._debiased:
            change = products * (-2 * (n - 2) / (n - 3))
        else:
            own = grams.diagonal(dim1=1, dim2=2).T  # (n, layers)
            ratio = n / (n - 1)
            change = -2 * ratio * products + ratio**2 * own[:, :, None] * own[:, None, :]
        self.by_batch[first] = change.float().cpu()

    def merge(self, world: World) -> None:
        """Move what all processes have to rank 0."""
        self.by_batch |= dict(world.blocks_to_first(self.by_batch))
        if not world.writes:
            self.by_batch = {}

    def changes(self, cross: Tensor) -> NDArray[np.float32]:
        """CKA less CKA without the example, (examples, layers, layers) float32; NaN where CKA is.

        Args:
            cross: (layers, layers): the sums of inner products over all batches.
        """
        whole = cross.cpu()
        found = []
        for _, change in sorted(self.by_batch.items()):
            without = whole + change
            found.append((_cosines(whole) - _cosines(without)).float())
        return np.asarray(torch.cat(found).numpy())


def _cosines(cross: Tensor) -> Tensor:
    own = cross.diagonal(dim1=-2, dim2=-1)
    own = torch.where(own > 0, own, torch.nan).sqrt()
    return cross / (own[..., :, None] * own[..., None, :])


def _examples(triangles: Tensor) -> int:
    return int((2 * triangles.shape[1]) ** 0.5)
