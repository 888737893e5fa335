"""The figures of a page, read back."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray


def figures_of(page: str) -> dict[str, Any]:
    """Measure -> name of a figure -> its panels as plotly gets them; those of no one measure under an empty name."""
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    figures: dict[str, Any] = json.loads(found.group(1))
    return figures


def numbers(written: Any) -> NDArray[np.float64]:
    """The array that plotly wrote, as a list or in base64."""
    if isinstance(written, list):
        return np.array(written, dtype=np.float64)
    array = np.frombuffer(base64.b64decode(written["bdata"]), written["dtype"])
    shape = [int(length) for length in written["shape"].split(",")] if "shape" in written else [-1]
    return array.reshape(shape).astype(np.float64)
