"""The comparison of student and teacher during a training."""

from __future__ import annotations

import torch

from cka_probe.distill.config import Training
from cka_probe.distill.probe import measure
from cka_probe.distill.subjects import examine
from cka_probe.images.sources.digits import Digits
from cka_probe.networks.models import load_subject
from cka_probe.results.cautions import equal_layers

CPU = torch.device("cpu")


def test_no_activation_of_the_teacher_is_compared_twice() -> None:
    """A stage of zoo:cnn is a container that returns what its last block returned."""
    student, teacher = (examine(load_subject(spec), "stages", CPU) for spec in ("zoo:vit@random", "zoo:cnn"))
    similarity = measure(student, teacher, Digits("validation"), Training(student="zoo:vit@random"), CPU)
    assert similarity is not None
    names = [layer.name for layer in similarity.between(student.subject.name, "zoo:cnn").cols]
    assert names == [f"layer{stage}{block}" for stage in range(1, 5) for block in (".0", "")]
    assert not equal_layers(similarity)
