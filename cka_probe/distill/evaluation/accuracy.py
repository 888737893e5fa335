"""Evaluate networks on labelled images: by their logits, or by their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import evaluating
from cka_probe.activations.logits import logits_of
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.distill.evaluation.class_matching import Matching, label_names, matched_classes
from cka_probe.distill.evaluation.loading import PreparedImages, collate_labelled
from cka_probe.distill.evaluation.score import Accuracy, Score
from cka_probe.distill.mixed_precision import autocast, check_device
from cka_probe.distill.options import Evaluation
from cka_probe.distill.training.pipeline import default_workers
from cka_probe.errors import DataError, NetworkError
from cka_probe.images.loading_time import explaining_lost_workers
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject
from cka_probe.probing.option_checks import check_models
from cka_probe.runtime.memory import keeping_freed_memory
from cka_probe.runtime.world import World, joined

if TYPE_CHECKING:
    pass


def accuracy_of(
    subject: Subject, images: ImageSource, world: World, options: Evaluation, network: nn.Module | None = None
) -> Accuracy:
    """The accuracy of a network, its images shared among the processes; the network keeps its training flags.

    Args:
        subject: the network and its preprocessing.
        images: to name; their labels are the numbers of the logits.
        world: the processes.
        options: batch size, workers, autocast.
        network: on the device of ``world``, in place of the subject's own, which runs as plain Python.

    Raises:
        DataError: an image cannot be read, or there is none.
        NetworkError: the network raises, or puts out something else than finite logits.
    """
    right = torch.zeros(2, dtype=torch.float64, device=world.device)

    def take(logits: Tensor, labels: Tensor) -> None:
        right.add_(right_names(logits, labels))

    _run(subject, images, world, options, network, take=take)
    top1, top5 = (world.sum(right) / len(images)).tolist()
    return Accuracy(len(images), top1, top5)


def evaluate(  # noqa: PLR0913  # public, keyword-only
    model: str | Subject, *,
    data: str = Evaluation.data, data_dir: str | None = Evaluation.data_dir, download: bool = Evaluation.download,
    full_scale: float | None = Evaluation.full_scale, skip_broken: bool = Evaluation.skip_broken,
    image_size: int | None = Evaluation.image_size, batch_size: int = Evaluation.batch_size,
    device: str = Evaluation.device, workers: int | None = Evaluation.workers, bf16: bool = Evaluation.bf16,
    fp16: bool = Evaluation.fp16, by: Literal["logits", "knn", "linear", "fewshot"] = Evaluation.by,
    neighbours: int = Evaluation.neighbours, shots: int = Evaluation.shots, ways: int = Evaluation.ways,
    episodes: int = Evaluation.episodes, seed: int = Evaluation.seed,
) -> Score:  # fmt: skip
    """The accuracy of a network on the images that a data spec names.

    >>> evaluate("zoo:cnn", data="digits").accuracy.images
    359

    Args:
        model: a model spec, or a `Subject`: a network with its preprocessing.
        data: a data spec with labels. Of a folder with ``test`` or ``val`` that part, else all images; of the folder
            that a run was trained on, for its student, the run's test images.
        data_dir: where a data set such as ``"torch/cifar100"`` lies.
        download: fetch the data set where it can be.
        full_scale: the pixel value that is white, as for `cka_probe.compare`.
        skip_broken: leave out images that cannot be read.
        image_size: height and width, in place of the model's own.
        batch_size: images a forward pass.
        device: where the network runs.
        workers: processes that decode images.
        bf16: run the network in bfloat16 by autocast.
        fp16: run it in float16 by autocast, on a CUDA device only.
        by: ``"logits"``, the network's own classifier; or the features that it gets: ``"knn"``, the nearest training
            images; ``"linear"``, logistic regression on the training images; ``"fewshot"``, episodes.
        neighbours: training images that vote, of knn.
        shots: images a class that make its prototype, of fewshot.
        ways: classes of an episode; all, where there are fewer.
        episodes: of one query a class.
        seed: of the episodes.

    Returns:
        Accuracy, predictions and confusion matrix.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change.
    """
    options = Evaluation(
        data=data, data_dir=data_dir, download=download, full_scale=full_scale, skip_broken=skip_broken,
        image_size=image_size, batch_size=batch_size, device=device, workers=workers, bf16=bf16,
        fp16=fp16, by=by, neighbours=neighbours, shots=shots, ways=ways, episodes=episodes, seed=seed,
    )  # fmt: skip
    options.check()
    if isinstance(model, str):
        check_models([model])
    with joined(device) as world:
        return evaluate_networks([model], options, world)[0]


def evaluate_networks(
    models: Sequence[str | Subject], options: Evaluation, world: World, done: Callable[[Score], None] | None = None
) -> list[Score]:
    """Evaluate several networks on the same images. All are loaded, and their classes matched, before the first runs.

    Args:
        models: specs, or networks with their preprocessing.
        options: that are checked.
        world: the processes that share the images.
        done: called on the process that writes, once a network is done.

    Raises:
        CkaProbeError: an argument is wrong; the message names the network and says what to change.
    """
    from cka_probe.distill.evaluation.images import evaluated_images, warn_if_untrained
    from cka_probe.distill.subjects import class_count, load
    from cka_probe.images.dark import warn_if_dark

    check_device(options, world.device)
    with world.first_ahead() if options.download else nullcontext():
        chosen = evaluated_images([model for model in models if isinstance(model, str)], options, world)
    warn_if_dark(chosen.images)
    subjects = [load(model, "Network", options.image_size) if isinstance(model, str) else model for model in models]
    if options.by != "logits":
        from cka_probe.distill.evaluation.by_features import scored_by_features

        return scored_by_features(subjects, chosen, options, world, done)
    warn_if_untrained([model for model in models if isinstance(model, str)])
    matchings = [
        matched_classes(label_names(subject), chosen.classes, class_count(subject), subject.name)
        for subject in subjects
    ]
    scores = []
    for subject, matching in zip(subjects, matchings, strict=True):
        accuracy, labels, predicted = _predictions(subject, chosen.images, world, options, matching)
        scores.append(
            Score(
                subject.name, accuracy, labels, predicted, chosen.classes, matching.how, chosen,
                subject.preprocessing, subject.source,
            )
        )  # fmt: skip
        if done is not None and world.writes:
            done(scores[-1])
    return scores


def _predictions(
    subject: Subject, images: ImageSource, world: World, options: Evaluation, matching: Matching
) -> tuple[Accuracy, NDArray[np.int64], NDArray[np.int64]]:
    """The accuracy, the label of each image, and the class that the network says."""
    logit_of = torch.tensor(matching.logits, device=world.device)
    said: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(logits: Tensor, labels: Tensor) -> None:
        odd = labels[(labels < 0) | (labels >= len(logit_of))]
        if len(odd):
            raise DataError(
                f"Every label of {images.name} must be a whole number from 0 to {len(logit_of) - 1}, as there are "
                f"{len(logit_of)} classes, but one is {odd[0].item()}."
            )
        targets = logit_of[labels]
        largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        said.append((labels, largest[:, 0], (largest == targets[:, None]).any(1)))

    _run(subject, images, world, options, take=take)
    own = [torch.cat(parts).cpu().numpy() for parts in zip(*said, strict=True)] if said else []
    whole = [np.empty(len(images), dtype=np.int64) for _ in range(3)]
    for rank, parts in enumerate(world.gathered(own)):
        for column, part in zip(whole, parts, strict=False):
            column[rank :: world.size] = part
    labels, largest, among = whole
    number_of = dict(zip(matching.logits, range(len(matching.logits)), strict=True))
    predicted = np.array([number_of.get(logit, len(number_of)) for logit in largest.tolist()], dtype=np.int64)
    return Accuracy(len(images), float((predicted == labels).mean()), float(among.mean())), labels, predicted


def _run(  # noqa: PLR0913  # six: the network that runs may be a compiled one or an average, not the subject's
    subject: Subject,
    images: ImageSource,
    world: World,
    options: Evaluation,
    network: nn.Module | None = None,
    *,
    take: Callable[[Tensor, Tensor], None],
) -> None:
    """Run a network on this process's share of the images, and hand over logits and labels of each batch."""
    if not len(images):
        raise DataError(f"{images.name} must hold images to evaluate on, but holds none.")
    eager, name = network is None, subject.name
    network = subject.network if network is None else network
    mine = range(world.rank, len(images), world.size)
    loader = DataLoader(
        PreparedImages(images, subject.preprocessing.transform(), mine),
        batch_size=options.batch_size,
        num_workers=default_workers(images, options.workers),
        collate_fn=collate_labelled,
        pin_memory=world.device.type == "cuda",
    )
    odd = torch.zeros(2, dtype=torch.float64, device=world.device)
    running = autocast(options, world.device)
    with evaluating(network, world.device, repr(name)), running, keeping_freed_memory(world.device):
        for number, batch in enumerate(explaining_lost_workers(loader)):
            if isinstance(batch, str):
                raise DataError(batch)
            inputs, labels = (part.to(world.device, non_blocking=True) for part in batch)
            place = f"in batch {number + 1} of {len(loader)}"
            doing = f"{name!r} must run on every batch, but {place} it"
            with explaining_out_of_memory(f"the evaluation of {name!r}", network, len(inputs)):
                output = run_network(network, inputs, doing, key=(number, world.rank), eager=eager)
                logits = logits_of(output, len(inputs), name, place)
                odd += torch.stack([logits.isnan().any(1).sum(), logits.isinf().any(1).sum()])
                take(logits, labels)
    for what, count in zip(("NaN", "infinity"), world.sum(odd).tolist(), strict=True):
        if count:
            raise NetworkError(
                f"The logits of {name!r} must be finite numbers, but those of {round(count)} of the {len(images)} "
                f"images hold {what}. Check its weights and its preprocessing."
            )


def right_names(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the largest logit, and how many are among the five largest, (2,) float64."""
    among = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([among[:, 0].sum(), among.sum()]).double()
