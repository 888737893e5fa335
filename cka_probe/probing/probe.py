"""One subject in the probing loop: the features of its layers on a batch go to the measures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cka_probe.activations.features import as_features
from cka_probe.activations.forward import own_modes, run_network
from cka_probe.activations.hooks import Activation, Latest, capture
from cka_probe.activations.trace import Trace, TracedLayer, put_out_again
from cka_probe.errors import NetworkError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.precision import Precision
from cka_probe.networks.models import Subject
from cka_probe.probing.job import Job
from cka_probe.probing.stored_features import StoredFeatures, epsilon_of, exponent_of
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)


class Sums(Protocol):
    """What a run gathers batch by batch, in several processes, and takes up again when it is resumed."""

    def settle(self, world: World) -> None:
        """Take over what rank 0's first batch has decided, for all batches."""

    def merge(self, world: World) -> None:
        """Bring what all processes have to rank 0, and start from zero on the others."""

    def state(self, folder: Path) -> dict[str, Any]:
        """What `load` needs to go on from here, of types that a checkpoint takes; what is large, into the folder."""

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None:
        """Go on from what `state` gave and wrote."""


class Receiver(Sums, Protocol):
    """What features go to: a measure, or what writes them down."""

    def prepare(self, layer: int, features: Features) -> None:
        """Take the features of a layer, by its index, for the batch under way."""

    def update(self, first: int) -> None:
        """Add the batch, whose first example has that number: every layer was prepared."""


class Tap(NamedTuple):
    """Where the features of a network are taken.

    Attributes:
        trace: of its dry run.
        layers: the chosen ones.
        first: number of the first of them among the layers of all subjects.
    """

    trace: Trace
    layers: Sequence[TracedLayer]
    first: int


class Probe:
    """One subject in the loop: runs its network on a batch and hands the features of its layers to the measures.

    Args:
        subject: the network and how it sees images.
        tap: its layers.
        measures: what takes the features.
        job: for its pooling, autocast and seed.
    """

    def __init__(self, subject: Subject, tap: Tap, measures: Sequence[Receiver], job: Job) -> None:
        traced, layers, first = tap
        self.subject = subject
        self._seed = job.images.seed
        self._calls = traced.calls
        self._often: set[str] = set()  # layers that were called more often than in the dry run, logged once
        # Only these are held until the next hook: to hold others would keep their memory from the forward pass.
        self._held = put_out_again(traced, layers)
        self._wanted = {layer.activation: (first + offset, layer.layout) for offset, layer in enumerate(layers)}
        self._modules = tuple(dict.fromkeys(which.module for which in self._wanted))
        self._measures = measures
        self._pool = job.features.pool
        self._amp = job.running.amp
        self._before_network = job.before_network
        self.precision = Precision(torch.finfo(torch.bfloat16).eps if self._amp else 0.0)
        self.features: dict[str, int] = {}  # layer -> how many it has
        self._names = {first + offset: layer.name for offset, layer in enumerate(layers)}

    def run(self, images: Tensor, number: int = 0, batches: int = 1) -> None:
        """Run the network on (n, c, h, w) images, each layer reduced as soon as it is computed.

        Args:
            images: of a batch; the network gets a copy.
            number: of the batch, from 0: with the seed it decides the network's random numbers.
            batches: how many there are, for messages.

        Raises:
            NetworkError: the network raises, or does not call the layers that it called in the dry run.
        """
        latest, missing = Latest(), set(self._wanted)
        device = images.device.type
        known: tuple[Any, Features] | None = None
        place = f"in batch {number + 1} of {batches}"

        def receive(which: Activation, tensor: Tensor) -> None:
            nonlocal known
            if which not in self._wanted:
                if which.call >= self._calls.get(which.module, 1):
                    self._warn_called_often(which.module, place)
                return
            index, layout = self._wanted[which]
            # A network may be in another mode for now, such as inference mode, whose tensors cannot be used after it.
            with torch.inference_mode(False), own_modes():
                if not (known and known[0] == layout and latest.holds(tensor)):
                    own = tensor.clone() if tensor.is_inference() else tensor.detach()
                    features = as_features(own, layout, self._pool or "none")
                    if len(features) != len(images):
                        raise NetworkError(
                            f"Layer {which.module!r} of {self.subject.name!r} must put out features for each of the "
                            f"{len(images)} images, but put out {len(features)} {place}: it changes with the batch. "
                            "Leave it out."
                        )
                    pooling = None if self._pool else partial(as_features, own, layout, "mean")
                    known = (layout, self.precision.features(index, features, pooling))
                self.features[self._names[index]] = known[1].x.shape[1]
                with torch.autocast(device, enabled=False):
                    for measure in self._measures:
                        measure.prepare(index, known[1])
                self.precision.note(index, known[1])
            if which in self._held:
                latest.hold(tensor)
            else:
                latest.release()
                known = None
            missing.discard(which)

        if self._before_network is not None:
            self._before_network()
        doing = f"{self.subject.name!r} must run on every batch, but {place} it"
        hooks = capture(self.subject.network, self._modules, receive)
        with hooks, torch.autocast(device, torch.bfloat16, enabled=self._amp):
            run_network(self.subject.network, images, doing, key=(self._seed, number))
        if missing:
            names = sorted({which.module for which in missing})
            raise NetworkError(
                f"Every forward pass of {self.subject.name!r} must call the same layers, but this one left out "
                f"{', '.join(names[:5])} {place}. Leave them out of the comparison."
            )
        self.precision.end_batch()

    def _warn_called_often(self, module: str, place: str) -> None:
        if module not in self._often:
            self._often.add(module)
            times = self._calls.get(module, 1)
            logger.warning(
                "%s calls the layer %s more often %s than in the dry run. Only its first %s compared.",
                self.subject.name, module, place, "call is" if times == 1 else f"{times} calls are",
            )  # fmt: skip


class StoredProbe:
    """The same for stored features: there is no network to run, only rows to hand over."""

    def __init__(
        self,
        subject: StoredFeatures,
        layers: Sequence[str],
        first: int,
        measures: Sequence[Receiver],
        device: torch.device,
    ) -> None:
        self.subject = subject
        self._layers = {first + offset: layer for offset, layer in enumerate(layers)}
        self._measures = measures
        self._device = device
        self.precision = Precision()
        self.features = {layer: subject.layers[layer].shape[1] for layer in layers}
        self._exponents = {index: exponent_of(subject.layers[layer]) for index, layer in self._layers.items()}

    def run(self, rows: NDArray[np.int64]) -> None:
        """Hand over the features of these examples."""
        for index, layer in self._layers.items():
            stored = self.subject.layers[layer]
            values = stored[rows]
            values = values.astype(np.result_type(values.dtype, np.float32), copy=False)
            x = torch.from_numpy(values).to(self._device)
            features = self.precision.features(index, x, epsilon=epsilon_of(stored))
            features.exponent = self._exponents[index]
            for measure in self._measures:
                measure.prepare(index, features)
            self.precision.note(index, features)
        self.precision.end_batch()
