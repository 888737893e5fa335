"""How an activation becomes features. Importing this loads nothing."""

from __future__ import annotations

from typing import Literal

Pool = Literal["none", "mean", "cls"]
"""``"none"`` keeps every value; ``"mean"`` averages over space or tokens; ``"cls"`` takes the class token, else the
mean."""
