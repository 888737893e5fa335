"""Batches: one augmented image for both networks, and random numbers that follow from the position alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cka_probe.distill.config import Training
from cka_probe.distill.training.pipeline import Batch, TrainingImages, Views, epoch_order
from cka_probe.errors import DataError
from cka_probe.images.parts import open_parts
from cka_probe.images.preprocessing import Preprocessing
from cka_probe.images.sources.folder import Folder
from cka_probe.runtime.randomness import seed_everything

Options = Callable[..., Training]
CPU = torch.device("cpu")
STUDENT = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
TEACHER = Preprocessing((3, 16, 16), (0.1, 0.2, 0.3), (0.3, 0.2, 0.1))


@pytest.fixture
def training(options: Options, colours: Path) -> TrainingImages:
    config = options(rand_augment="rand-m5")
    parts = open_parts(colours, memory=1)
    return TrainingImages(parts.train, config, (3, 16, 16))


def test_an_epoch_visits_each_image_once_and_each_epoch_in_another_order(training: TrainingImages) -> None:
    first, second = (torch.cat([batch.indices for batch in training.epoch(epoch)]) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(72)) == sorted(second.tolist())
    assert first.tolist() != second.tolist()
    assert first.tolist() == epoch_order(72, seed=0, epoch=0).tolist()


def test_an_epoch_goes_on_from_any_step(training: TrainingImages) -> None:
    whole = list(training.epoch(3))
    seed_everything(12345)
    for one, other in zip(whole[4:], training.epoch(3, first=4), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)


def test_processes_share_a_step_of_twice_the_batch(training: TrainingImages) -> None:
    config = replace(training.config, batch_size=6)
    whole = [batch.indices.tolist() for batch in training.epoch(0)]
    shares = [
        [batch.indices.tolist() for batch in replace(training, config=config, rank=rank, world=2).epoch(0)]
        for rank in (0, 1)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_the_paper_s_augmentation_runs_on_every_image(training: TrainingImages) -> None:
    """Timm's PosterizeIncreasing asks Pillow for 0 bits now and then: some hundred images meet it."""
    config = replace(training.config, rand_augment="rand-m9-mstd0.5-inc1")
    for epoch in range(8):
        assert sum(len(batch.images) for batch in replace(training, config=config).epoch(epoch)) == 72


def test_steps_are_whole_groups_of_accumulated_batches(training: TrainingImages) -> None:
    assert training.steps == 6
    assert replace(training, config=replace(training.config, accumulate=4)).steps == 4
    assert replace(training, config=replace(training.config, batch_size=80)).steps == 0


def test_each_network_sees_the_same_pixels_in_its_own_normalization(options: Options) -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    student, teacher, target = Views(options(mixup=0.8, cutmix=1.0, erasing=0.5), 3, STUDENT, TEACHER, CPU)(batch)
    pixels = student * 0.5 + 0.5
    expected = (pixels - torch.tensor(TEACHER.mean).view(1, 3, 1, 1)) / torch.tensor(TEACHER.std).view(1, 3, 1, 1)
    torch.testing.assert_close(teacher(), expected, rtol=1e-5, atol=1e-5)
    assert target.shape == (4, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(4))


def test_without_mixing_the_images_are_normalized_and_the_target_is_the_label(options: Options) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    student, teacher, target = Views(options(), 3, STUDENT, STUDENT, CPU)(
        Batch(images, torch.tensor([2, 1]), target_indices())
    )
    torch.testing.assert_close(student, (images.float() / 255 - 0.5) / 0.5)
    assert teacher() is student
    assert target.tolist() == [2, 1]


def target_indices() -> torch.Tensor:
    return torch.arange(2)


def test_a_network_of_another_size_gets_the_image_resized(options: Options) -> None:
    images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    small, large = replace(STUDENT, size=(3, 16, 16)), replace(TEACHER, size=(3, 32, 32))
    student, teacher, _ = Views(options(), 3, small, large, CPU)(Batch(images, torch.zeros(2).long(), torch.arange(2)))
    assert (student.shape[-1], teacher().shape[-1]) == (16, 32)


def test_random_numbers_of_different_positions_differ_and_of_the_same_agree() -> None:
    def drawn(*key: int) -> tuple[float, float]:
        seed_everything(*key)
        return torch.rand(1).item(), float(np.random.rand())

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    assert len({drawn(0, epoch, step) for epoch in range(5) for step in range(5)}) == 25


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(options: Options, tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(8):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "a" / "3.png").write_text("no image")
    source = Folder(tmp_path, ("a", "b"))
    training = TrainingImages(source, options(workers=workers, batch_size=2), (3, 16, 16))
    with pytest.raises(DataError, match=r"3.png must be an image"):
        list(training.epoch(0))
