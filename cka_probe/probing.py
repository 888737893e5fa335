"""One subject in the probing loop: its network runs on a batch, and its layers' features go to the measures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from cka_probe.errors import NetworkError
from cka_probe.features import Features, Pool, as_features
from cka_probe.hooks import Activation, Latest, capture
from cka_probe.measures import Measure
from cka_probe.models import Subject
from cka_probe.trace import Trace, TracedLayer, put_out_again


class Probe:
    """One subject in the loop: runs its network on a batch and hands the features of its layers to the measures."""

    def __init__(
        self,
        subject: Subject,
        traced: Trace,
        layers: Sequence[TracedLayer],
        first: int,
        measures: Sequence[Measure],
        pool: Pool | None,
    ) -> None:
        self.subject = subject
        # Only these are held until the next hook: to hold others would keep their memory from the forward pass.
        self._held = put_out_again(traced, layers)
        self._wanted = {layer.activation: (first + offset, layer.layout) for offset, layer in enumerate(layers)}
        self._modules = tuple(dict.fromkeys(which.module for which in self._wanted))
        self._measures = measures
        self._pool = pool
        self._with_offset: set[int] = set()
        self.features: dict[str, int] = {}  # layer -> how many it has
        self._names = {first + offset: layer.name for offset, layer in enumerate(layers)}

    def run(self, images: Tensor) -> None:
        """Run the network on (n, c, h, w) images, each layer reduced as soon as it is computed."""
        latest, missing = Latest(), set(self._wanted)
        known: tuple[Any, Features] | None = None

        def receive(which: Activation, tensor: Tensor) -> None:
            nonlocal known
            if which not in self._wanted:
                return
            index, layout = self._wanted[which]
            if not (known and known[0] == layout and latest.holds(tensor)):
                features = as_features(tensor, layout, self._pool or "none")
                if len(features) != len(images):
                    raise NetworkError(
                        f"Layer {which.module!r} of {self.subject.name!r} must put out features for each of the "
                        f"{len(images)} images, but put out {len(features)}: it changes with the batch. Leave it out."
                    )
                pooling = None if self._pool else partial(as_features, tensor, layout, "mean")
                known = (layout, Features(features, has_offset=index in self._with_offset, pooling=pooling))
            self.features[self._names[index]] = known[1].x.shape[1]
            for measure in self._measures:
                measure.prepare(index, known[1])
            if known[1].has_offset:
                self._with_offset.add(index)
            if which in self._held:
                latest.hold(tensor)
            else:
                latest.release()
                known = None
            missing.discard(which)

        with capture(self.subject.network, self._modules, receive):
            self.subject.network(images)
        if missing:
            names = sorted({which.module for which in missing})
            raise NetworkError(
                f"Every forward pass of {self.subject.name!r} must call the same layers, but this one left out "
                f"{', '.join(names[:5])}. Leave them out of the comparison."
            )


def probes_of(
    subjects: Sequence[Subject],
    traces: Sequence[Trace],
    chosen: Sequence[Sequence[TracedLayer]],
    measures: Sequence[Measure],
    pool: Pool | None,
) -> list[Probe]:
    """A probe of each subject; the measures number the layers of all subjects one after the other."""
    probes, first = [], 0
    for subject, traced, layers in zip(subjects, traces, chosen, strict=True):
        probes.append(Probe(subject, traced, layers, first, measures, pool))
        first += len(layers)
    return probes
