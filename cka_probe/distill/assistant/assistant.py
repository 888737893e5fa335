"""The assistant: the early stages of one network, L2G, and the rest of another network, as one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.cutting.graphs import Crossing
from cka_probe.activations.cutting.recordings import restoring_buffers
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.segments import Head, Tail, cut, keeping_flags
from cka_probe.activations.taps import Taps
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.assistant.l2g import LocalToGlobal
from cka_probe.distill.assistant.statistics import OwnStatistics
from cka_probe.distill.methods.loss import Side
from cka_probe.errors import NetworkError
from cka_probe.runtime.randomness import keeping_random_state


@dataclass(frozen=True)
class Part:
    """A network that an assistant is made of.

    Attributes:
        side: the network.
        stage: number of the stage behind which it is cut, from 1; not its last one.
        learns: whether it is the student.
    """

    side: Side
    stage: int
    learns: bool

    @property
    def layer(self) -> TracedLayer:
        """The stage behind which it is cut."""
        return self.side.stages[self.stage - 1]

    @property
    def last(self) -> TracedLayer:
        """The last stage."""
        return self.side.stages[-1]


class Assistant(nn.Module):
    """The stages of one network up to a cut, L2G, and another network from its cut on.

    The modules of both networks are theirs, not copies. What is new is L2G, and the running statistics of a tail that
    its network trains. The parts that the teacher gives stay in evaluation mode, whatever `train` is called on.

    Args:
        first: gives the early stages.
        second: gives the rest.
        classes: of the logits.
        compiled: run the tail compiled.

    Attributes:
        name: for messages.
        stages: names of the layers where its stages end.

    Raises:
        NetworkError: one of the two cannot be cut there, with the reason.
    """

    def __init__(self, first: Part, second: Part, classes: int, *, compiled: bool = False) -> None:
        super().__init__()
        self.name = f"assistant of {first.side.name} and {second.side.name}"
        self.stages = (
            *(f"head.{layer.name}" for layer in first.side.stages[: first.stage]),
            "l2g",
            *(f"tail.{layer.name}" for layer in second.side.stages[second.stage :]),
        )
        self._source, self._frozen = first.layer, (not first.learns, not second.learns)
        self.head, _ = _cut(first)
        inner, self.tail = _cut(second)
        self.l2g = LocalToGlobal(first.side.shape_of(first.layer), second.side.shape_of(second.layer))
        images = _noise(second.side)
        self.l2g.to(images.device)
        network = second.side.network
        with keeping_random_state(), keeping_flags(network):
            self.tail.train(second.learns)
            with restoring_buffers(network):
                activation = self._checked(inner(images), second)
            self.statistics = OwnStatistics(self.tail, activation)
        self._taps = Taps(self.tail, (second.last,), name=self.name, compiled=compiled, classes=classes)
        if compiled:
            self.tail.compile()

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) images of the first network -> logits (n, classes)."""
        return self.from_stage(_first_tensor(self.head(images), self._source), "on images")[0]

    def from_stage(self, activation: Tensor, place: str = "in training") -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and the activation of the second network's last stage.

        Args:
            activation: that the first network put out at its cut, in a forward pass of its own.
            place: for messages.

        Raises:
            NetworkError: the tail raises.
        """
        with self.statistics.used():
            logits, (last,) = self._taps.run(self.l2g(activation), place)
        return logits, last

    def train(self, mode: bool = True) -> Assistant:
        """As `torch.nn.Module.train`, except for the parts of the teacher."""
        super().train(mode)
        for segment, frozen in zip((self.head, self.tail), self._frozen, strict=True):
            if frozen:
                segment.eval()
        return self

    def release(self) -> None:
        """Take the hooks off the second network."""
        self._taps.remove()

    def _checked(self, output: Any, second: Part) -> Tensor:
        """What the second network's stage puts out, where its tail runs on that alone and calls the last stage."""
        activation = output.activation if isinstance(output, Crossing) else output
        if not isinstance(activation, Tensor):
            raise NetworkError(
                f"The assistant needs a stage that puts out one tensor, but {second.layer.name!r} of "
                f"{second.side.name!r} puts out a {type(activation).__name__}. Move the cut (--cut)."
            )
        taps = Taps(self.tail, (second.last,), name=second.side.name, classes=0)
        try:
            taps.run(activation, "in its dry run", key=(0,))
        except NetworkError as error:
            raise NetworkError(
                f"The assistant must run {second.side.name!r} from {second.layer.name!r} on, on the activation of that "
                f"stage alone, but this is impossible. Move the cut (--cut). {error}"
            ) from error
        finally:
            taps.remove()
        return activation.detach()


def _cut(part: Part) -> tuple[Head, Tail]:
    try:
        return cut(part.side.network, part.layer.name, _noise(part.side))
    except NetworkError as error:
        raise NetworkError(f"{part.side.name!r} cannot be part of an assistant. {error}") from error


def _noise(side: Side) -> Tensor:
    """Two images for a network, on its device and in its type."""
    weight = next(side.network.parameters())
    noise = torch.rand(2, *side.input_size, generator=torch.Generator().manual_seed(0))
    return noise.to(weight)


def _first_tensor(output: Any, layer: TracedLayer) -> Tensor:
    """The activation of a traced layer in what a head puts out."""
    output = output.activation if isinstance(output, Crossing) else output
    return output if isinstance(output, Tensor) else dict(tensors_in(output))[layer.activation.output]
