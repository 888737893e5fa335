"""config.json beside an exported student."""

from __future__ import annotations

import pytest
import timm

from cka_probe.distill.outputs.export import model_config
from cka_probe.networks.models import Subject, load_subject

ORIGIN = {"tag", "license", "url", "hf_hub_id", "source", "origin_url", "paper_ids", "description"}


@pytest.mark.parametrize("spec", ["resnet10t@random", "zoo:cnn@random", "vit_tiny_patch16_224@random"])
def test_a_student_from_scratch_has_no_origin(spec: str) -> None:
    subject = load_subject(spec)
    classes = [str(i) for i in range(10 if spec.startswith("zoo") else 1000)]
    config = model_config(subject, classes)
    assert not ORIGIN & config["pretrained_cfg"].keys()
    assert config["label_names"] == classes


def test_a_student_from_pretrained_weights_keeps_their_licence() -> None:
    network = timm.create_model("resnet10t", num_classes=2)
    subject = Subject("resnet10t", network, source={"spec": "resnet10t"})
    assert model_config(subject, ["a", "b"])["pretrained_cfg"]["license"] == network.pretrained_cfg["license"]


@pytest.mark.parametrize(("spec", "mean"), [("resnet10t,in_chans=1@random", 1), ("resnet10t,in_chans=4@random", 4)])
def test_mean_and_deviation_follow_the_channels(spec: str, mean: int) -> None:
    config = model_config(load_subject(spec), ["a"] * 1000)
    assert len(config["pretrained_cfg"]["mean"]) == len(config["pretrained_cfg"]["std"]) == mean
    assert config["model_args"]["in_chans"] == mean


def test_what_timm_cannot_make_has_no_architecture() -> None:
    config = model_config(load_subject("zoo:vit"), [str(i) for i in range(10)])
    assert "architecture" not in config
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
