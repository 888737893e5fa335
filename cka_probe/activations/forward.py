"""How a network is called, everywhere: what it does is seen by no other, and what it raises is told by its name.

A network gets a copy of the images in its own floating type, and random numbers that follow from a key alone. Gradient
mode, default type, number of threads and the like are afterwards what they were, and so are the network's buffers.
What ``torch.compile`` made runs as plain Python, so that hooks see each module.
"""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cka_probe.activations.modules import modules_of
from cka_probe.errors import CkaProbeError, NetworkError
from cka_probe.runtime.memory import is_out_of_memory
from cka_probe.runtime.randomness import keeping_random_state, seed_everything

logger = logging.getLogger(__name__)

_NOT_THE_USER_S = (str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"])
_Mode = tuple[Callable[[], Any], Callable[[Any], Any]]


def run_network(
    network: nn.Module, images: Tensor, doing: str, *, key: tuple[int, ...] | None = None, eager: bool = True
) -> Any:
    """The output of a network on images.

    Args:
        network: on the device of the images.
        images: (n, c, h, w); the network gets a copy.
        doing: begins the message where it raises something: ``"'vit' in batch 5 of 10"``.
        key: seeds its random numbers, and the global random state is kept; where None, it draws from that state.
        eager: run what is compiled as plain Python.

    Raises:
        NetworkError: it raises anything but a `CkaProbeError`, a KeyboardInterrupt or that memory is short.
    """
    with ExitStack() as stack:
        stack.enter_context(naming_errors(f"{doing} raised"))
        if eager:
            stack.enter_context(eagerly())
        stack.enter_context(_keeping_modes())
        _AROUND.append([get() for get, _ in _MODES])
        stack.callback(_AROUND.pop)
        if key is not None:
            stack.enter_context(keeping_random_state())
            seed_everything(*key)
        if network in _BUFFERS:
            stack.callback(_BUFFERS[network].restore)
        return network(_own(network, images))


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Within the block, what a network raises is a NetworkError whose message begins with ``what``.

    Interrupts, this package's errors and those that say that memory is short stay what they are.
    """
    try:
        yield
    except (KeyboardInterrupt, CkaProbeError):
        raise
    except BaseException as error:  # a user's code may raise anything, SystemExit too
        if is_out_of_memory(error):
            raise
        raise NetworkError(f"{what} {told(error)}") from error


def told(error: BaseException, *, with_place: bool = True) -> str:
    """An error of a user's code in one line, with the place where it was raised."""
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:  # the text of a user's error is a user's code too
        lines = []
    # TorchScript tells its own traceback first.
    line = (lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]) if lines else ""
    place = _place(error) if with_place else ""
    return f"{type(error).__name__}{f': {line}' if line else ''}".removesuffix(".") + (f" ({place})." if place else ".")


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the block, what ``torch.compile`` made runs as plain Python."""
    if "torch._dynamo" not in sys.modules:  # to import it takes seconds, and before that nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def keeping_globals() -> Iterator[None]:
    """Within the block, a user's code may change random states and modes; afterwards they are what they were."""
    with keeping_random_state(), _keeping_modes():
        yield


@contextmanager
def keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Within the block, each pass of `run_network` starts from the buffers that the network has now."""
    before = _BUFFERS.get(network)
    keep_buffers(network)
    try:
        yield
    finally:
        if before is None:
            _BUFFERS.pop(network, None)
        else:
            _BUFFERS[network] = before


def keep_buffers(network: nn.Module) -> None:
    """From now on, each pass of `run_network` starts from the buffers that the network has now."""
    _BUFFERS[network] = _Buffers(network)


@contextmanager
def watching_weights(network: nn.Module, name: str) -> Iterator[None]:
    """Warn where the network changed its own parameters within the block: copies of all would take much memory."""
    before = _weights(network)
    yield
    after = _weights(network)
    changed = [path for path, value in before.items() if path in after and repr(after[path]) != repr(value)]
    if changed:
        logger.warning(
            "%s changes its own weights while it runs (%s). Its values depend on how often it ran before.",
            name, ", ".join(changed[:3]),
        )  # fmt: skip


class _Buffers:
    """The buffers of a network, to be put back after each pass."""

    def __init__(self, network: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in modules_of(network).values():
            if isinstance(module, torch.jit.ScriptModule):  # its buffers are not Python's
                continue
            for name, buffer in module._buffers.items():
                if buffer is None or is_lazy(buffer):
                    continue
                try:
                    values = buffer.detach().clone()
                    buffer.detach().copy_(values)
                except (RuntimeError, NotImplementedError):
                    continue  # it cannot be written, so that the network does not change it either
                self._kept.append((module, name, buffer, values))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back. One of another shape is a cache that has grown, and stays."""
        changed: list[Tensor] = []
        values: list[Tensor] = []
        for module, name, buffer, kept in self._kept:
            now = module._buffers.get(name)
            if now is None or now.shape != kept.shape or buffer.shape != kept.shape:
                continue
            module._buffers[name] = buffer
            changed.append(buffer.detach())
            values.append(kept)
        if changed:
            torch._foreach_copy_(changed, values)


_BUFFERS: WeakKeyDictionary[nn.Module, _Buffers] = WeakKeyDictionary()


@contextmanager
def own_modes() -> Iterator[None]:
    """Within the block, which a hook opens in `run_network`, gradient mode and the like are those from before it."""
    with _keeping_modes():
        if _AROUND:
            _set_modes(_AROUND[-1])
        yield


@contextmanager
def _keeping_modes() -> Iterator[None]:
    before = [get() for get, _ in _MODES]
    try:
        yield
    finally:
        _set_modes(before)


def _set_modes(values: list[Any]) -> None:
    for (get, put), value in zip(_MODES, values, strict=True):
        if get() != value:
            put(value)


_AROUND: list[list[Any]] = []
"""The modes around each pass that is under way."""


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch 2.9 and later: it was set for each backend apart
        return ""


def _set_matmul_precision(precision: str) -> None:
    if precision:
        torch.set_float32_matmul_precision(precision)


def _autocast(device: str) -> _Mode:
    return lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on)


_MODES: tuple[_Mode, ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (_matmul_precision, _set_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    _autocast("cpu"),
    _autocast("cuda"),
)
"""What decides the values of every network: how it is read, and how it is set."""


def _own(network: nn.Module, images: Tensor) -> Tensor:
    """A copy of the images in the type of the network's weights."""
    kind = next((weight.dtype for weight in network.parameters() if weight.is_floating_point()), images.dtype)
    return images.clone() if kind == images.dtype else images.to(kind)


@torch.no_grad()
def _weights(network: nn.Module) -> dict[str, tuple[int, float]]:
    """Path -> version and sum of each parameter; the version of one that changes by ``.data`` stays."""
    found = {path: weight for path, weight in network.named_parameters() if not is_lazy(weight)}
    plain = {path: weight for path, weight in found.items() if weight.is_floating_point() and weight.numel()}
    sums = [weight.sum(dtype=torch.float64).cpu() for weight in plain.values()]
    return {path: (weight._version, float(total)) for (path, weight), total in zip(plain.items(), sums, strict=True)}


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code in the traceback of an error, if there is one."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and "dist-packages" not in frame.filename
        and Path(frame.filename).is_file()
        and not frame.filename.startswith(_NOT_THE_USER_S)
    ]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
