"""How many held-out images a network names right, with the uncertainty of so many images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cka_probe.distill.config import Evaluation
from cka_probe.distill.logits import logits_of
from cka_probe.distill.pipeline import default_workers
from cka_probe.errors import DataError, NetworkError, SpecError
from cka_probe.forward import run_network
from cka_probe.hooks import evaluating
from cka_probe.images.files import naming_unreadable
from cka_probe.images.sources import ImageSource, read_labelled
from cka_probe.memory import explaining_out_of_memory, keeping_freed_memory
from cka_probe.models import Subject
from cka_probe.option_checks import check_models
from cka_probe.waiting import telling_of_lost_workers
from cka_probe.world import World, joined

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Accuracy:
    """The outcome of an evaluation.

    Attributes:
        images: how many.
        top1: share whose class got the largest logit.
        top5: share whose class is among the five largest; among all, where there are fewer.
    """

    images: int
    top1: float
    top5: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The Wilson score interval of `top1`: the network fixed, the images drawn.

        >>> low, high = Accuracy(100, 0.9, 1.0).interval()
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
        """
        from scipy.stats import norm

        z = float(norm.ppf((1 + level) / 2))
        n, p = self.images, self.top1
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - reach, middle + reach


def evaluate(
    subject: Subject, images: ImageSource, world: World, options: Evaluation, network: nn.Module | None = None
) -> Accuracy:
    """The accuracy of a network, its images shared among the processes; the network keeps its training flags.

    Args:
        subject: the network and its preprocessing.
        images: to name.
        world: the processes.
        options: batch size, workers, autocast.
        network: on the device of ``world``, in place of the subject's own, which runs as plain Python.

    Raises:
        DataError: an image cannot be read, or there is none.
        NetworkError: the network raises, or puts out something else than logits.
    """
    if not len(images):
        raise DataError(f"{images.name} must hold images to evaluate on, but holds none.")
    eager, name = network is None, subject.name
    network = subject.network if network is None else network
    mine = range(world.rank, len(images), world.size)
    loader = DataLoader(
        _Prepared(images, subject.preprocessing.transform(), mine),
        batch_size=options.batch_size,
        num_workers=default_workers(images, options.workers),
        collate_fn=_collate,
        pin_memory=world.device.type == "cuda",
    )
    right = torch.zeros(3, dtype=torch.float64, device=world.device)
    autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=options.bf16)
    with evaluating(network, world.device, repr(name)), autocast, keeping_freed_memory(world.device):
        for number, batch in enumerate(telling_of_lost_workers(loader)):
            if isinstance(batch, str):
                raise DataError(batch)
            inputs, labels = (part.to(world.device, non_blocking=True) for part in batch)
            place = f"in batch {number + 1} of {len(loader)}"
            doing = f"{name!r} must run on every batch, but {place} it"
            with explaining_out_of_memory(f"the evaluation of {name!r}", network, len(inputs)):
                output = run_network(network, inputs, doing, key=(number, world.rank), eager=eager)
                logits = logits_of(output, len(inputs), name, place)
                right += _right(logits, labels)
    top1, top5, undefined = (world.sum(right) / len(images)).tolist()
    if undefined:
        raise NetworkError(
            f"The logits of {name!r} must be numbers, but those of {round(undefined * len(images))} of the "
            f"{len(images)} images hold NaN. Check its weights and its preprocessing."
        )
    return Accuracy(len(images), top1, top5)


def evaluate_spec(  # noqa: PLR0913  # public, keyword-only
    spec: str, *,
    data: str = Evaluation.data, data_dir: str | None = Evaluation.data_dir, download: bool = Evaluation.download,
    full_scale: float | None = Evaluation.full_scale, image_size: int | None = Evaluation.image_size,
    batch_size: int = Evaluation.batch_size,
    device: str = Evaluation.device, workers: int | None = Evaluation.workers, bf16: bool = Evaluation.bf16,
) -> Accuracy:  # fmt: skip
    """The accuracy of the network that a model spec names, on the held-out images that a data spec names.

    Args:
        spec: of the model.
        data: a data spec with labels.
        data_dir: where a data set such as ``"torch/cifar100"`` lies.
        download: fetch the data set where it can be.
        full_scale: the pixel value that is white, as for `cka_probe.compare`.
        image_size: height and width, in place of the model's own.
        batch_size: images a forward pass.
        device: where the network runs.
        workers: processes that decode images.
        bf16: run the network in bfloat16 by autocast.

    Raises:
        CkaProbeError: of one kind or another, where the caller can mend it.
    """
    from cka_probe.distill.subjects import class_count, load
    from cka_probe.images.dark import warn_if_dark
    from cka_probe.images.parts import open_parts

    options = Evaluation(
        data=data, data_dir=data_dir, download=download, full_scale=full_scale, image_size=image_size,
        batch_size=batch_size, device=device, workers=workers, bf16=bf16,
    )  # fmt: skip
    options.check()
    check_models([spec])
    with joined(device) as world:
        parts = open_parts(data, data_dir=data_dir, download=download, full_scale=full_scale)
        warn_if_dark(parts.test)
        subject = load(spec, "Network", image_size)
        found = class_count(subject)
        if found != len(parts.classes):
            raise SpecError(
                f"The network must have the data's {len(parts.classes)} classes, but {subject.name!r} has {found}."
            )
        return evaluate(subject, parts.test, world, options)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the largest logit, and among the five largest, and how many images have NaN, (3,) float64."""
    among = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([among[:, 0].sum(), among.sum(), logits.isnan().any(1).sum()]).double()


class _Prepared(Dataset[Any]):
    def __init__(self, images: ImageSource, transform: Callable[[Image], Tensor], mine: range) -> None:
        self._images, self._transform, self._mine = images, transform, mine

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | str:
        try:
            index = self._mine[position]
            image, label = read_labelled(self._images, index)
            with naming_unreadable(self._images.place(index)):
                return self._transform(image), label
        except DataError as error:
            return str(error)  # raised in a worker process, it would bring its traceback


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    good = []
    for item in items:
        if isinstance(item, str):
            return item
        good.append(item)
    inputs, labels = zip(*good, strict=True)
    return torch.stack(inputs), torch.tensor(labels)
