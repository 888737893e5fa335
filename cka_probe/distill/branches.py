"""OFA's exit branches: from a stage of the student to logits (Hao et al. 2023, arXiv 2310.19444, section 3.2).

Which branch a stage gets is read from the activation that a dry run saw: a map with its channels first gets a
convolutional one; tokens, and maps with their channels last (as timm's Swin), get one of transformer blocks.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.activations.stage_shapes import StageShape

GRID = 7
"""Tokens are merged two by two until their grid has at most so many rows and columns."""

HEADS = 4


def exit_branch(
    shape: StageShape, remaining: int, *, student_width: int, teacher_width: int, classes: int
) -> nn.Module:
    """The exit branch of a stage: a module from the stage's activation to logits (n, classes), newly initialized.

    Args:
        shape: of the activation.
        remaining: stages of the student after this one: 3 for the first of four, 0 for the last.
        student_width: channels of the student's last stage.
        teacher_width: channels of the teacher's last stage.
        classes: of the logits.
    """
    if shape.kind == "map":
        branch: nn.Module = MapBranch(shape.channels, remaining, max(student_width, teacher_width), classes)
    else:
        branch = TokenBranch(shape, remaining, student_width, classes)
    branch.apply(initialize)
    return branch


class MapBranch(nn.Module):
    """For maps (n, c, h, w): a stride-2 separable convolution a remaining stage, mean pooling, a linear layer.

    Args:
        channels: c.
        remaining: how many convolutions, the channels doubling, the last one to ``width``; with none, a 1 × 1
            convolution to ``width``.
        width: channels before pooling.
        classes: of the logits.
    """

    def __init__(self, channels: int, remaining: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [channels * 2**step for step in range(remaining)] + [width]
        steps = [_separable(inside, outside) for inside, outside in pairwise(widths)]
        self.project = nn.Sequential(*steps) if steps else nn.Conv2d(channels, width, 1)
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, classes)."""
        logits: Tensor = self.classify(self.project(x).mean((2, 3)))
        return logits


class TokenBranch(nn.Module):
    """For tokens (n, t, c) and maps (n, h, w, c): patch merging, transformer blocks, a linear layer.

    The class token bypasses the merging and is what the linear layer reads; without one it reads the mean. Where
    tokens are merged to another width than the class token has, the mean is read too.

    Args:
        shape: of the activation.
        remaining: stages after this one; so many blocks, at least one.
        width: of the tokens once they were merged; tokens of a small grid keep their own.
        classes: of the logits.
    """

    def __init__(self, shape: StageShape, remaining: int, width: int, classes: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        rows, columns = self._grid = shape.grid
        merging, inside = [], shape.channels
        while max(rows, columns) > GRID:
            merging.append(PatchMerging(inside, width))
            rows, columns, inside = (rows + 1) // 2, (columns + 1) // 2, width
        self._prefix = shape.prefix_tokens
        self._keeps_prefix = self._prefix > 0 and inside == shape.channels
        self.merge = nn.Sequential(*merging)
        self.blocks = nn.Sequential(
            *(Block(inside, gcd(HEADS, inside), qkv_bias=True) for _ in range(max(remaining, 1)))
        )
        self.classify = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, c) or (n, h, w, c) -> (n, classes)."""
        tokens = x.flatten(1, 2) if x.ndim == 4 else x
        prefix, tokens = tokens[:, : self._prefix], tokens[:, self._prefix :]
        merged = self.merge(tokens.unflatten(1, self._grid)).flatten(1, 2)
        if self._keeps_prefix:
            merged = torch.cat([prefix, merged], 1)
        out = self.blocks(merged)
        logits: Tensor = self.classify(out[:, 0] if self._keeps_prefix else out.mean(1))
        return logits


class PatchMerging(nn.Module):
    """2 × 2 neighbours side by side (4c), a LayerNorm, a linear layer without bias, GELU: as in Swin.

    Args:
        channels: c.
        width: of the merged tokens.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, c) -> (n, ⌈h/2⌉, ⌈w/2⌉, width); an odd side is padded with zeros."""
        rows, columns = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return F.gelu(self.reduce(self.norm(torch.cat(corners, -1))))


def _separable(channels: int, width: int) -> nn.Sequential:
    """Two depthwise-separable 3 × 3 convolutions, the first with stride 2, the second to ``width`` channels."""

    def half(outside: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(*half(channels, 2), *half(width, 1))


def initialize(module: nn.Module) -> None:
    """Convolutions Kaiming fan-out, linear layers truncated normal 0.02, norms 1 and 0, biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)
