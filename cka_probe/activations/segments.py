"""A network up to a stage, and from there on: two modules that share the network's own parameters.

The forward passes of the modules around the stage (the network itself, the sequences that hold the stage) are recorded
as a graph, which is cut behind the stage. All other modules are called as they are: they keep their training flags,
hooks and checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cka_probe.activations.cutting.graphs import Crossing
from cka_probe.activations.cutting.modules import Head, Tail
from cka_probe.activations.cutting.recordings import Recordings, restoring_buffers
from cka_probe.activations.forward import eagerly
from cka_probe.activations.hooks import tensors_in
from cka_probe.activations.modules import is_exported, module_at, modules_of, unwrapped
from cka_probe.errors import NetworkError, SpecError
from cka_probe.runtime.memory import is_out_of_memory
from cka_probe.runtime.randomness import keeping_random_state, seed_everything
from cka_probe.runtime.user_code import describe_error, keeping_modes, naming_errors

__all__ = ["Crossing", "Head", "Tail", "cut"]


def cut(network: nn.Module, stage: str, example: Tensor) -> tuple[Head, Tail]:
    """The network up to a stage, and from there on.

    ``tail(head(x))`` is ``network(x)``, bit for bit on a CPU, in evaluation and in training mode; it is checked on the
    example. The modules, parameters and buffers are those of the network, and so are the training flags:
    ``tail.eval()`` sets the tail's modules, and the flag of the network itself, which both segments share.

    ``head(x)`` is what the stage puts out. Where the rest of the network needs more than that (sizes, masks, a skip
    connection), it is a `Crossing`, which ``tail`` takes as well. ``tail(activation)`` alone, on an activation that was
    taken from the network's forward pass or made by something else, works where the rest follows from the example's
    image size and from the batch size. Where the network writes over the stage's output later in its forward pass, a
    hook must take a copy.

    The example fixes nothing but what the network's own Python code asks of shapes, such as ``if h % 2``: where another
    batch gives another answer, the segments raise. Hooks of the modules around the stage do not run, and what they
    checkpoint is not checkpointed. Cut after ``network.to(...)`` and after a new classifier; cut again after a module
    was replaced. Segments cannot be pickled.

    Args:
        network: any network that torch.fx can trace around the stage. Of a compiled one, or one in
            `DistributedDataParallel`, the network inside is cut. It is given back as it came.
        stage: path of a module, such as ``layer2`` or ``blocks.3``; ``act[1]`` for the second call of one that is
            called several times.
        example: (n, c, h, w) with n of 2 or more, on the network's device and in its floating type.

    Returns:
        (head, tail).

    Raises:
        SpecError: the network has no module of that path.
        NetworkError: the network cannot be cut there, with the reason.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    >>> images = torch.rand(2, 3, 8, 8)
    >>> head, tail = cut(network, "1", images)
    >>> head(images).shape, torch.equal(tail(head(images)), network(images))
    (torch.Size([2, 4, 6, 6]), True)
    >>> [name for name, _ in tail.named_parameters()]
    ['3.weight', '3.bias']
    """
    network = unwrapped(network)
    path, call = _parsed(network, stage)
    if len(example) < 2:
        raise NetworkError(f"A network is cut on 2 example images or more, but got {len(example)}.")
    doing = f"The network must be cut behind {stage!r}, but"
    with ExitStack() as stack:
        for context in (
            keeping_random_state(),
            keeping_modes(),
            torch.enable_grad(),
            eagerly(),
            keeping_flags(network),
        ):
            stack.enter_context(context)
        recordings = Recordings(network, path, call, example.detach().clone())
        for training in (False, True):
            network.train(training)
            with naming_errors(f"The network must run on the example, but in {_mode(training)} mode it raised"):
                _run(network, network, example)
            recordings.current()
        head, tail = Head(recordings), Tail(recordings)
        for training in (True, False):
            network.train(training)
            _check(network, head, tail, example, f"{doing} in {_mode(training)} mode")
        larger = torch.cat([example, example[:1]])
        _check(network, head, tail, larger, f"{doing} for another batch size than the example's")
    return head, tail


def _parsed(network: nn.Module, stage: str) -> tuple[str, int | None]:
    """Path and call of a stage as `TracedLayer.name` has it; which of several outputs does not matter to a cut."""
    if isinstance(network, torch.jit.ScriptModule) or is_exported(network):
        raise NetworkError("A TorchScript module or exported program cannot be cut. Cut the network it was made from.")
    matched = re.fullmatch(r"([^\[:]*)(?:\[(\d+)\])?(?::.*)?", stage)
    path = matched[1] if matched else stage
    try:
        module = module_at(network, path)
    except AttributeError:
        module = network
    if module is network or matched is None:
        names = ", ".join(name for name, _ in network.named_children())
        raise SpecError(f"A network is cut behind one of its modules, but it has no {stage!r}. It has: {names}.")
    return path, int(matched[2]) if matched[2] else None


def _check(network: nn.Module, head: Head, tail: Tail, images: Tensor, doing: str) -> None:
    """Refuse a cut whose segments do not do what the network does."""
    expected, state = _run(network, network, images)
    try:
        found, own_state = _run(network, lambda batch: tail(head(batch)), images)
    except NetworkError as error:
        raise NetworkError(f"{doing} this is impossible: {error}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NetworkError(f"{doing} the segments raise {describe_error(error)}") from error
    difference = _difference(expected, found) or (None if state == own_state else "random states or buffers")
    if difference and _difference(expected, _run(network, network, images)[0]):
        raise NetworkError(f"{doing} the network itself puts out different values when it runs twice with one seed.")
    if difference:
        why = " It writes over a tensor that head and tail use." if head.shares_changed_values() else ""
        raise NetworkError(f"{doing} the segments compute something else than the network: {difference} differ.{why}")


def _run(network: nn.Module, run: Any, images: Tensor) -> tuple[Any, list[Any]]:
    """Output, and the states afterwards; the network's buffers are put back."""
    with restoring_buffers(network):
        seed_everything(0)
        output = run(images.clone())
        buffers = [buffer for module in modules_of(network).values() for buffer in module._buffers.values()]
        sums = [
            str(buffer.double().sum().item()) for buffer in buffers if buffer is not None and not buffer.is_complex()
        ]
    return output, [*sums, torch.get_rng_state().tolist()]


def _difference(expected: Any, found: Any) -> str | None:
    if type(expected) is not type(found):
        return f"the types of their outputs ({type(expected).__name__}, {type(found).__name__})"
    first, second = dict(tensors_in(expected)), dict(tensors_in(found))
    if first.keys() != second.keys():
        return "the fields of their outputs"
    for name, tensor in first.items():
        other = second[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype or tensor.requires_grad != other.requires_grad:
            return "shape, type or requires_grad of their outputs"
        if not _equal(tensor.detach(), other.detach()):
            return "the values of their outputs"
    return None


def _equal(expected: Tensor, found: Tensor) -> bool:
    """Bit for bit on a CPU; elsewhere kernels may add in another order from run to run."""
    if expected.device.type == "cpu":
        return bool(((expected == found) | ((expected != expected) & (found != found))).all())
    difference = (expected.double() - found.double()).nan_to_num().norm()
    return bool(difference <= 1e-3 * expected.double().nan_to_num().norm())


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


@contextmanager
def keeping_flags(network: nn.Module) -> Iterator[None]:
    """Within the block, training flags may be set at will; afterwards they are as they were."""
    flags = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
