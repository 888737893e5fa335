"""A saved similarity, read back: its provenance has the types that pictures and pages use."""

from __future__ import annotations

from pathlib import Path

from cka_probe.results.similarity import Similarity
from cka_probe.runtime.records import Optional, Shape, check

_PROVENANCE: Shape = {
    "data?": {
        "source": str, "examples": int, "images?": (int, None), "sample_sha256?": str, "paired?": str,
        "duplicates?": {"images": int, "pairs": [[str, str]]}, "broken?": [{"image": str, "error": str}],
    },
    "subjects?": [
        {
            "name": str, "spec?": Optional, "weights?": Optional, "parameters?": int, "features?": {str: int},
            "model?": str, "stored?": str, "left_out?": {str: str},
            "preprocessing?": ({"size": [int, int, int], "interpolation": Optional, "crop_pct": Optional}, str),
            "view?": {"name": str, "package?": str, "pixels?": int},
        }
    ],
    "versions?": {str: Optional}, "layers?": ([str], str), "batch_size?": int, "batches?": int, "blocks?": int,
    "debiased?": (bool, None), "amp?": (bool, None), "kernel?": (str, None), "threshold?": float, "rdm?": str,
    "rdm_comparison?": str, "pool?": (str, None), "seed?": Optional, "device?": Optional,
}  # fmt: skip


def load_similarity(path: Path) -> Similarity:
    """A saved similarity, whose provenance has the types that pictures and pages use.

    Raises:
        OutputError: it cannot be read, or its provenance has others.
    """
    similarity = Similarity.load(path)
    check(path, dict(similarity.provenance), _PROVENANCE, "its provenance")
    return similarity
