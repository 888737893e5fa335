"""Students and teachers that lack what most have: maps, layers, the data's classes, one output, something to train."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.distill.networks import CONFIG, SIZE, plain_vit, teacher, tiny_cnn


def perceptron() -> nn.Module:
    """Vectors alone."""
    return _sees(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 16), nn.ReLU(), nn.Linear(16, 3)))


def convolutions() -> nn.Module:
    """Written by hand: bare layers, the last of them a Linear."""
    return _sees(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 3),
        )
    )  # fmt: skip


class Means(nn.Module):
    """The mean of each channel, through a linear layer, which names each colour right."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.eye_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return 20 * self.linear(x.mean((2, 3)))


def teacher_of_vectors() -> nn.Module:
    return _sees(Means())


class Convolutional(nn.Module):
    """Maps for the features, and the mean of each channel for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.means = convolutions(), Means()

    def forward(self, x: Tensor) -> Tensor:
        self.maps(x)
        return self.means(x)


def convolutional_teacher() -> nn.Module:
    return _sees(Convolutional())


def scripted_teacher() -> nn.Module:
    """Its layers cannot be observed."""
    return torch.jit.script(Means())


class Bare(nn.Module):
    """A network without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return 20 * (x.mean((2, 3)) @ self.matrix)


def bare() -> nn.Module:
    return _sees(Bare())


class Headless(nn.Module):
    """Stages whose last map is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = teacher().stages

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)


def headless() -> nn.Module:
    return _sees(Headless())


class Outputs(NamedTuple):
    logits: Tensor
    aux: Tensor


class Auxiliary(nn.Module):
    """The logits of a ViT, and in training mode those of a head of its own beside them."""

    def __init__(self, kind: str, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.kind = inner or plain_vit(), kind
        self.aux = nn.Linear(3 * SIZE**2, 3)
        self.pretrained_cfg = dict(CONFIG)

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        if self.kind == "none" or not (self.training or self.kind == "always"):
            return logits
        aux = self.aux(x.flatten(1))
        return {
            "tuple": (logits, aux),
            "always": (logits, aux),
            "list": [logits, aux, None],
            "named": Outputs(logits, aux),
            "mapping": OrderedDict(aux=aux, logits=logits),
            "swapped": (aux[:, :2], logits),
        }[self.kind]


def auxiliary(kind: str) -> nn.Module:
    torch.manual_seed(11)
    return Auxiliary(kind)


def frozen() -> nn.Module:
    return tiny_cnn().requires_grad_(False)


def _sees(network: nn.Module) -> nn.Module:
    network.pretrained_cfg = dict(CONFIG)  # type: ignore[assignment]
    return network
