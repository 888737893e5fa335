"""Small networks whose activations are known, each with one trap."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Reused(nn.Module):
    """One activation module called twice, in place, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


class Pair(NamedTuple):
    features: Tensor
    indices: Tensor


class Outputs(nn.Module):
    """Modules that put out a tuple, a list, a dict, a named tuple and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.as_tuple, self.as_list, self.as_dict, self.named = (
            _Returns(kind) for kind in ("tuple", "list", "dict", "named")
        )
        self.integers = _Returns("integers")

    def forward(self, x: Tensor) -> Tensor:
        for module in (self.as_tuple, self.as_list, self.as_dict, self.named, self.integers):
            module(x)
        return x.flatten(1)


class _Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        flat = x.flatten(1)
        return {
            "tuple": (flat, None, 2 * flat),
            "list": [flat],
            "dict": {"logits": flat, "loss": flat.mean()},
            "named": Pair(flat, flat.argmax(1)),
            "integers": flat.argmax(1),
        }[self.kind]


class Windows(nn.Module):
    """Activations in which the parts of an image share the batch axis, side by side and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.side_by_side, self.apart, self.sequence_first = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.view(n, c, 2, h // 2, w).transpose(1, 2)  # (n, 2, c, h/2, w)
        self.side_by_side(parts.reshape(2 * n, c, h // 2, w))
        self.apart(parts.transpose(0, 1).reshape(2 * n, c, h // 2, w))
        self.sequence_first(x.flatten(2).permute(2, 0, 1))
        return x


class Constant(nn.Module):
    """A layer that says the same of every image, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.constant, self.varying = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.constant(torch.full((len(x), 5), 0.1))
        return self.varying(x.flatten(1))


def small_cnn(width: int = 8) -> nn.Module:
    """A factory whose weights fit a checkpoint of the same width alone."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    )


def ragged_images() -> Tensor:
    """77 images: batches of 8 leave a last one of 5."""
    return torch.rand(77, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def offset_networks() -> dict[str, nn.Module]:
    """Two networks of one architecture; the features of their last layer lie far from 0, and are to be centered."""
    networks: dict[str, nn.Module] = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        networks[name] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        with torch.no_grad():
            networks[name][-1].bias += 1e4  # type: ignore[index,operator]
    return networks


class Killed(BaseException):
    """What no code expects, as little as SIGKILL."""


def killed_after(batches: int, *arguments: Any, minutes: float = 0, **options: Any) -> None:
    """Compare, but for the batches after so many; every ``minutes`` what is there is saved, after each batch by 0."""
    from cka_probe import compare

    def kill(done: int, total: int) -> None:
        # It is called before the batch is saved.
        if done > batches * options["batch_size"]:
            raise Killed

    with suppress(Killed):
        compare(*arguments, progress=kill, checkpoint_minutes=minutes, **options)
