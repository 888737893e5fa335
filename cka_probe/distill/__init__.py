"""Distillation between any two networks: from logits, through exit branches, or from features.

The package is also the function ``cka_probe.distill``: called, it is `cka_probe.distill.from_python.distill`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _CallablePackage(ModuleType):
    """A package and a function of one name: importing any module of it would replace a plain function."""

    @property
    def __signature__(self) -> inspect.Signature:
        from cka_probe.distill.from_python import distill

        return inspect.signature(distill)

    def __call__(self, **options: Any) -> Any:
        """See `cka_probe.distill.from_python.distill`."""
        from cka_probe.distill.from_python import distill

        return distill(**options)


if TYPE_CHECKING:
    from cka_probe.distill.from_python import distill as distill
else:
    distill = sys.modules[__name__]
    distill.__class__ = _CallablePackage
