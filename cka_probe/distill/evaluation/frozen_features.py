"""The features that a network's classifier gets, of every image: for scores that train nothing of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import evaluating
from cka_probe.activations.logits import logits_in
from cka_probe.activations.modules import modules_of
from cka_probe.activations.out_of_memory import explaining_out_of_memory
from cka_probe.activations.taps import Taps
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.evaluation.loading import PreparedImages, collate_labelled
from cka_probe.distill.methods.loss import Side, pooled
from cka_probe.distill.mixed_precision import autocast
from cka_probe.distill.options import Evaluation
from cka_probe.distill.training.pipeline import default_workers
from cka_probe.errors import DataError, NetworkError
from cka_probe.images.loading_time import explaining_lost_workers
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World


class Features(NamedTuple):
    """Of the images of a source, in their order.

    Attributes:
        values: (n, d) float32.
        labels: (n,) int64.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64]


def feature_layer(side: Side) -> TracedLayer:
    """The layer whose output is a network's features: what its classifier, a last Linear, gets.

    Of a network that says it has no classifier, by ``num_classes`` 0 as timm's do, that is its output; of any other the
    last stage.

    Args:
        side: the network and its layers.

    Raises:
        NetworkError: no layer of it can be observed.
    """
    network = side.network
    device = next(network.parameters(), torch.zeros(())).device
    images = torch.rand(2, *side.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    passed: list[tuple[str, nn.Module, Any, Any]] = []
    with _noting(network, passed), evaluating(network, device, repr(side.name)):
        output = logits_in(run_network(network, images, f"{side.name!r} must run on images, but", key=(0,)))
    heads = [got for _, module, got, out in passed if isinstance(module, nn.Linear) and out is output]
    wanted = heads[-1] if heads else output if getattr(network, "num_classes", None) == 0 else None
    for path, _, _, out in reversed(passed):
        layer = side.layers.get(path)
        if out is wanted and layer is not None and len(layer.shape) == 1 and layer.activation.call == 0:
            return layer
    if not side.stages:
        raise NetworkError(f"{side.name!r} has no layer that can be observed, so that it has no features to score.")
    return side.stages[-1]


@contextmanager
def _noting(network: nn.Module, passed: list[tuple[str, nn.Module, Any, Any]]) -> Iterator[None]:
    """Within the block, note path, module, first input and output of each call of a module."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, output: passed.append((path, module, args[0] if args else None, output))

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in modules_of(network).items()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features_of(
    subject: Subject, layer: TracedLayer, images: ImageSource, world: World, options: Evaluation
) -> Features:
    """The features of all images, shared among the processes, on every process.

    Args:
        subject: on the device of ``world``.
        layer: of `feature_layer`.
        images: labelled.
        world: the processes.
        options: batch size, workers, autocast.

    Raises:
        DataError: an image cannot be read, or there is none.
        NetworkError: the network raises, or a feature is not finite.
    """
    if not len(images):
        raise DataError(f"{images.name} must hold images to evaluate on, but holds none.")
    mine = range(world.rank, len(images), world.size)
    loader = DataLoader(
        PreparedImages(images, subject.preprocessing.transform(), mine),
        batch_size=options.batch_size,
        num_workers=default_workers(images, options.workers),
        collate_fn=collate_labelled,
        pin_memory=world.device.type == "cuda",
    )
    network, found = subject.network, []
    taps = Taps(network, (layer,), name=subject.name, classes=0)
    try:
        with evaluating(network, world.device, repr(subject.name)), autocast(options, world.device):
            for number, batch in enumerate(explaining_lost_workers(loader)):
                if isinstance(batch, str):
                    raise DataError(batch)
                inputs, labels = (part.to(world.device, non_blocking=True) for part in batch)
                with explaining_out_of_memory(f"the features of {subject.name!r}", network, len(inputs)):
                    taken = taps.run(inputs, f"in batch {number + 1} of {len(loader)}", (number, world.rank))[1][0]
                found.append((pooled(taken, layer).cpu().numpy(), labels.cpu().numpy()))
    finally:
        taps.remove()
    own = [np.concatenate(parts) for parts in zip(*found, strict=True)] if found else []
    return _together(world.gathered(own), len(images), subject.name)


def _together(parts: list[list[NDArray[Any]]], count: int, name: str) -> Features:
    """The images of all processes in their order: process r has the images r, r + processes, ..."""
    width = next(part for part in parts if part)[0].shape[1]
    values, labels = np.empty((count, width), np.float32), np.empty(count, np.int64)
    for rank, part in enumerate(parts):
        if part:
            values[rank :: len(parts)], labels[rank :: len(parts)] = part
    odd = int((~np.isfinite(values)).any(1).sum())
    if odd:
        raise NetworkError(
            f"The features of {name!r} must be finite, but those of {odd} of {count} images are not. Check its weights "
            "and its preprocessing."
        )
    return Features(values, labels)
