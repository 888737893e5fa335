"""A provenance: attributes for what our code reads, and the very mapping that it was read from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from cka_probe import Provenance
from cka_probe.errors import OutputError

RECORD: dict[str, Any] = {
    "subjects": [
        {
            "spec": "zoo:cnn", "name": "cnn", "weights": "random, seed 0", "code_sha256": "ab", "parameters": 7,
            "preprocessing": {"size": [3, 8, 8], "interpolation": "bicubic", "crop_pct": None},
            "view": {"sigma": 1.0, "name": "blur:1"}, "features": {"l0": 4}, "left_out": {},
        },
        {"name": "kept", "stored": "a.npy", "features": {"x": 3}, "pool": "mean"},
    ],
    "data": {
        "source": "digits", "images": None, "examples": 8,
        "duplicates": {"images": 1, "pairs": [["a", "b"]]}, "broken": [{"image": "c", "error": "empty"}],
    },
    "somebody's": [1, {"order": 2, "others": 3}], "pool": None, "amp": False, "seed": 0, "blocks": 0, "others": {},
}  # fmt: skip


def test_the_record_of_a_provenance_is_the_one_that_it_was_read_from_to_the_byte() -> None:
    assert json.dumps(Provenance.from_record(RECORD).as_record()) == json.dumps(RECORD)
    assert Provenance.from_record({}) == Provenance()
    assert Provenance().as_record() == {}


def test_what_it_tells_has_types() -> None:
    made = Provenance.from_record(RECORD)
    assert made.data is not None
    assert (made.data.source, made.data.examples, made.data.images, made.data.paired) == ("digits", 8, None, None)
    assert made.data.duplicates is not None
    assert (made.data.duplicates.images, made.data.broken[0].image) == (1, "c")
    network, stored = made.subjects
    assert network.view is not None
    assert (network.view.name, network.view.others, network.others) == ("blur:1", {"sigma": 1.0}, {"code_sha256": "ab"})
    assert (stored.stored, stored.parameters, stored.view, stored.left_out) == ("a.npy", None, None, {})
    assert (made.blocks, made.batches, made.amp, made.seed, made.plan) == (0, None, False, 0, None)
    assert made.others == {"somebody's": [1, {"order": 2, "others": 3}], "others": {}}


def test_what_is_added_comes_last_and_what_is_changed_keeps_its_place() -> None:
    made = Provenance.from_record({"pool": None, "amp": False})
    changed = replace(made, seed=3, pool="mean", others={"bandwidths": [1.0]})
    assert list(changed.as_record().items()) == [("pool", "mean"), ("amp", False), ("seed", 3), ("bandwidths", [1.0])]
    extended = made.extended({"variance": 0.9, "pool": "none", "batches": 2})
    assert list(extended.as_record()) == ["pool", "amp", "variance", "batches"]
    assert (extended.pool, extended.batches, extended.others) == ("none", 2, {"variance": 0.9})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"data": {"examples": 8}}, "its provenance.data has no 'source'"),
        ({"data": {"source": "x", "examples": "8"}}, "its provenance.data.examples must be int, but is '8'"),
        ({"subjects": {}}, "its provenance.subjects must be a list, but is dict"),
        ({"batches": True}, "its provenance.batches must be int, but is 'True'"),
    ],
)
def test_another_type_is_refused(record: dict[str, Any], said: str) -> None:
    with pytest.raises(OutputError, match=said):
        Provenance.from_record(record)
