"""L2G ("local to global"): from a stage of one network to the input that the rest of another network expects."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.activations.stage_shapes import StageShape, as_map
from cka_probe.distill.branches import initialize

WINDOW = 7
"""Rows and columns of an attention window; a smaller grid is one window."""

HEAD_WIDTH = 32
"""Channels of an attention head, as in Swin; more where the width is no multiple of it."""


class LocalToGlobal(nn.Module):
    """A patch embedding and one block of windowed attention (FBT as described; Swin: arXiv 2103.14030).

    The patch embedding fits width and grid: a convolution whose kernel and stride are the ratio of the two grids. Where
    the ratio is no whole number, the map is resampled and the kernel is 1 × 1.

    Args:
        source: shape of what comes in.
        target: shape of what goes out. Its prefix tokens (class and register tokens) are learned.
    """

    def __init__(self, source: StageShape, target: StageShape) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformerBlock

        self._source, self._target = source, target
        width = target.channels
        ratio = tuple(a // b if a % b == 0 else 0 for a, b in zip(source.grid, target.grid, strict=True))
        self._resamples = 0 in ratio
        kernel = (1, 1) if self._resamples else ratio
        self.embed = nn.Conv2d(source.channels, width, kernel, stride=kernel)  # type: ignore[arg-type]  # two numbers
        self.norm = nn.LayerNorm(width)
        self.block = SwinTransformerBlock(width, target.grid, num_heads=_heads(width), window_size=WINDOW)
        self.apply(initialize)
        self.prefix = nn.Parameter(torch.empty(1, target.prefix_tokens, width)) if target.prefix_tokens else None
        if self.prefix is not None:
            nn.init.trunc_normal_(self.prefix, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """An activation of the one network's stage -> one as the other network's stage puts out.

        Either is (n, c, h, w), (n, t, c) or (n, h, w, c), as its `StageShape` says.
        """
        x = as_map(x, self._source)
        if self._resamples:
            x = _resampled(x, self._target.grid)
        x = self.block(self.norm(self.embed(x).permute(0, 2, 3, 1)))
        if self._target.kind == "map":
            return x.permute(0, 3, 1, 2).contiguous()
        if self._target.kind == "map_last":
            return x
        tokens = x.flatten(1, 2)
        if self.prefix is None:
            return tokens
        return torch.cat([self.prefix.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)


def _heads(width: int) -> int:
    """As many heads of `HEAD_WIDTH` channels as divide the width."""
    return next(count for count in range(max(width // HEAD_WIDTH, 1), 0, -1) if width % count == 0)


def _resampled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, c, h, w) on another grid: a larger side by bilinear interpolation, a smaller one by means."""
    larger = max(grid[0], x.shape[2]), max(grid[1], x.shape[3])
    if larger != tuple(x.shape[2:]):
        x = F.interpolate(x, larger, mode="bilinear")
    return F.adaptive_avg_pool2d(x, grid) if larger != grid else x
