"""What made a result: the versions that count."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

FROM_FACTORY = "as the factory returns it"
"""Said of the weights of a user's network without a checkpoint."""

_PACKAGES = ("cka-probe", "torch", "torchvision", "timm", "numpy")


def versions() -> dict[str, str]:
    """Package -> version, of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
