"""``--train head``: the classifier alone learns. The rest stays as it is, in evaluation mode and without gradients.

Where no augmentation is random, an image is seen as in evaluation and its features are computed once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import evaluating
from cka_probe.activations.modules import module_at, modules_of
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.accuracy import right_names
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.mixed_precision import autocast
from cka_probe.distill.preparation import Prepared
from cka_probe.distill.training.pipeline import Batch, TrainingImages
from cka_probe.errors import SpecError
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject
from cka_probe.runtime.user_code import naming_errors
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

_AT_ONCE = 4096  # images whose logits are computed together


def with_head_alone(ready: Prepared, config: Training, world: World) -> Prepared:
    """What a training is made from where the classifier alone learns: the rest frozen, features computed once.

    Raises:
        SpecError: the student has no classifier that is known.
    """
    subject = ready.student.subject
    heads = classifier_of(subject)
    _freeze_all_but(subject.network, heads)
    if is_random(config):
        return ready
    assert isinstance(ready.images, TrainingImages), "nothing has replaced them yet"
    plain = replace(ready.images, plain=subject.preprocessing)
    ready = replace(ready, images=plain)
    if len(heads) > 1:
        return ready
    logger.info("The features of the %d training images are computed once.", len(plain.source))
    found = _features(ready, plain, heads[0], world)
    if found is None:
        logger.info("They cannot be kept: each step runs the whole network.")
        return ready
    return replace(
        ready,
        images=FeatureBatches(plain, *found),
        views=_as_they_are,
        trained=modules_of(subject.network)[heads[0]],
        accuracy=HeadAccuracy(ready, plain, heads[0], world),
    )


def is_random(config: Training) -> bool:
    """Whether the augmentation shows an image in another way each epoch."""
    crops = tuple(config.crop_scale) != (1, 1)
    others = (config.flip, config.color_jitter, config.rand_augment, config.mixup, config.cutmix, config.erasing)
    return crops or any(others)


def classifier_of(subject: Subject) -> list[str]:
    """Paths of a network's classifiers: those that timm's ``get_classifier`` gives, or its last Linear.

    Raises:
        SpecError: it has none.
    """
    network: Any = subject.network
    modules = modules_of(network)
    given: Any = None
    if hasattr(network, "get_classifier"):
        with naming_errors(f"{subject.name!r} must give its classifier, but its get_classifier() raised"):
            given = network.get_classifier()
    wanted = [module for module in (given if isinstance(given, (tuple, list)) else [given]) if _learns(module)]
    found = [path for path, module in modules.items() if any(module is one for one in wanted)]
    if not found:
        found = [path for path, module in modules.items() if isinstance(module, nn.Linear)][-1:]
    if not found:
        raise SpecError(
            f"--train head needs a classifier, but {subject.name!r} has neither get_classifier() nor a Linear. Give it "
            "one of them, or train all of it."
        )
    return found


@dataclass(frozen=True)
class FeatureBatches:
    """Batches of features, in the order in which their images would come.

    Attributes:
        order: the batches of the images.
        features: (n, ...) what the classifier gets of each image, on the CPU.
        labels: (n,) int64.
    """

    order: TrainingImages
    features: Tensor
    labels: Tensor

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.order.steps

    def epoch(self, epoch: int, *, first: int = 0, pin: bool = False) -> Iterator[Batch]:
        """The batches of an epoch from its step ``first`` on."""
        for numbers in self.order.numbers(epoch, first):
            chosen = torch.tensor(numbers)
            batch = Batch(self.features[chosen], self.labels[chosen], chosen)
            yield batch.pin_memory() if pin else batch


class HeadAccuracy:
    """The accuracy of a student whose classifier alone changes: the features of each image are computed once.

    Args:
        ready: what the training was made from.
        images: how images are seen, and in which batches.
        head: path of the classifier.
        world: the processes.
    """

    def __init__(self, ready: Prepared, images: TrainingImages, head: str, world: World) -> None:
        self._ready, self._images, self._head, self._world = ready, images, head, world
        self._known: dict[int, tuple[Tensor, Tensor] | None] = {}

    @torch.no_grad()
    def __call__(self, network: nn.Module, source: ImageSource) -> Accuracy | None:
        """The accuracy on the images of a source; None where their features cannot be kept.

        Args:
            network: the student, or an average of it.
            source: of labelled images.
        """
        if id(source) not in self._known:
            images = replace(self._images, source=source)
            self._known[id(source)] = _features(self._ready, images, self._head, self._world)
        found = self._known[id(source)]
        if found is None:
            return None
        head: Any = module_at(network, self._head)
        device = self._world.device
        right = torch.zeros(2, dtype=torch.float64, device=device)
        for features, labels in zip(*(part.split(_AT_ONCE) for part in found), strict=True):
            with autocast(self._images.config, device):
                logits = head(features.to(device))
            if not torch.isfinite(logits).all():
                return None  # the evaluation of the whole network says so
            right += right_names(logits, labels.to(device))
        top1, top5 = (right / len(found[1])).tolist()
        return Accuracy(len(found[1]), top1, top5)


@dataclass(frozen=True)
class _RestInEvaluation:
    """Before each pass, whatever set the network to training mode: all but the classifiers are in evaluation mode.

    An object that knows paths alone: a copied network gets a copy that speaks of its own modules.
    """

    heads: tuple[str, ...]

    def __call__(self, network: nn.Module, *_: Any) -> None:
        for path, module in network.named_modules():
            if module.training and not any(path == head or path.startswith(f"{head}.") for head in self.heads):
                module.training = False


def _freeze_all_but(network: nn.Module, heads: list[str]) -> None:
    network.requires_grad_(False)
    for path in heads:
        modules_of(network)[path].requires_grad_(True)
    network.register_forward_pre_hook(_RestInEvaluation(tuple(heads)))


def _features(ready: Prepared, images: TrainingImages, path: str, world: World) -> tuple[Tensor, Tensor] | None:
    """What the classifier gets of every image (n, ...), and the labels (n,).

    None where the logits are not the classifier's output, or the features take more memory than images may.
    """
    subject = ready.student.subject
    network, head = subject.network, modules_of(subject.network)[path]
    count, config = len(images.source), images.config
    taken: list[Any] = []
    labels = torch.zeros(count, dtype=torch.int64)
    features: Tensor | None = None
    fits = True
    handle = head.register_forward_pre_hook(lambda _, args: taken.append(args))
    try:
        with evaluating(network, world.device, repr(subject.name)), autocast(config, world.device):
            for batch in images.in_order(range(world.rank, count, world.size)):
                taken.clear()
                seen, _, _ = ready.views(batch.to(world.device))
                doing = f"{subject.name!r} must run on every image, but for its features it"
                with explaining_out_of_memory(f"the features of {subject.name!r}", network, len(seen)):
                    logits = run_network(network, seen, doing, key=(config.seed, world.rank))
                values = _only_input(taken, len(seen))
                if values is None or not _is_output(head, values, logits):
                    fits = False
                    break
                if features is None:
                    fits = count * values[0].numel() * values.element_size() <= config.image_cache * 2**30
                    features = values.new_zeros(count if fits else 0, *values.shape[1:], device="cpu")
                if not fits:
                    break
                features[batch.indices] = values.cpu()
                labels[batch.indices] = batch.labels
    finally:
        handle.remove()
    empty = next(
        (part for part in world.gathered(None if features is None else features[:0]) if part is not None), None
    )
    if empty is None or not all(world.gathered(fits)):
        return None
    if features is None:  # of a process that has no image
        features = empty.new_zeros(count, *empty.shape[1:])
    if world.size > 1:
        features, labels = (world.sum(part.to(world.device)).cpu() for part in (features, labels))
    return features, labels


def _only_input(taken: list[Any], images: int) -> Tensor | None:
    """What the classifier got, where that is one tensor of these images, once; else None."""
    if len(taken) != 1 or len(taken[0]) != 1:
        return None
    (value,) = taken[0]
    return value if isinstance(value, Tensor) and value.ndim > 1 and len(value) == images else None


def _is_output(head: nn.Module, features: Tensor, logits: Any) -> bool:
    again = head(features)
    return isinstance(logits, Tensor) and again.shape == logits.shape and bool(torch.allclose(again, logits))


def _learns(module: Any) -> bool:
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def _as_they_are(batch: Batch) -> tuple[Tensor, Callable[[], Tensor], Tensor]:
    """Features for the student's classifier, and the target; there is no teacher."""
    return batch.images, lambda: batch.images, batch.labels
