"""Which network comes first in an assistant."""

from __future__ import annotations

import pytest
import timm

from cka_probe.distill.assistant.kinds import direction, kind_of
from tests.distill.assistant.conftest import examined

KINDS = {
    "resnet10t": "cnn",  # with squeeze and excitation in none of its blocks
    "convnext_atto": "cnn",
    "seresnext26t_32x4d": "cnn",  # channel attention is none
    "vit_tiny_patch16_224": "attention",
    "pit_ti_224": "attention",
    "pvt_v2_b0": "attention",  # its MLPs hold convolutions
    "caformer_s18": "attention",  # convolutions in the first two stages
    "mobilevit_xxs": "attention",
    "resmlp_12_224": "mlp",
    "poolformer_s12": "mlp",  # convolutions between the stages alone
}


SIZED = ("vit_tiny_patch16_224", "pit_ti_224", "resmlp_12_224")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_timm_networks(name: str) -> None:
    network = timm.create_model(name, num_classes=3, **({"img_size": 64} if name in SIZED else {}))
    assert kind_of(examined(name, network, 64).side) == KINDS[name]


def test_the_convolutional_network_comes_first() -> None:
    cnn, vit, other = (examined(name).side for name in ("tiny_cnn", "tiny_vit", "plain_vit"))
    assert direction(cnn, vit) == ("student-first", "tiny_cnn is convolutional and tiny_vit is not")
    assert direction(vit, cnn) == ("teacher-first", "tiny_cnn is convolutional and tiny_vit is not")
    assert direction(vit, other) == ("student-first", "neither is convolutional")
    assert direction(cnn, cnn) == ("student-first", "both are convolutional")
