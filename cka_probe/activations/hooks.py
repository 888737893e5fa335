"""Forward hooks that hand over an activation at once, and always come off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cka_probe.activations.forward import keeping_buffers, watching_weights
from cka_probe.activations.modules import is_exported, module_at, modules_of, unwrapped
from cka_probe.errors import NetworkError
from cka_probe.runtime.user_code import naming_errors


class Activation(NamedTuple):
    """Which tensor of a forward pass: an output of a call of a module.

    Attributes:
        module: its path in the network, such as ``layer1.0.conv1``.
        call: 0 the first time the module is called in the forward pass, 1 the second, ...
        output: where in the output: ``""`` a bare tensor, ``"0"`` the first of a tuple, ``"hidden"`` a key or field.
    """

    module: str
    call: int = 0
    output: str = ""


class Latest:
    """Remembers the tensor captured last, to know it again when a container returns it as its own output."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = 0

    def hold(self, tensor: Tensor) -> None:
        """Remember ``tensor`` as it is now."""
        # An inference tensor does not count its in-place changes, so it is never known again.
        self._tensor, self._version = (None, 0) if tensor.is_inference() else (tensor, tensor._version)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is that very tensor, unchanged."""
        # Addresses would not show it: memory is used again.
        return tensor is self._tensor and tensor._version == self._version

    def release(self) -> None:
        """Forget the tensor."""
        self._tensor = None


@contextmanager
def capture(
    network: nn.Module, modules: Iterable[str], receive: Callable[[Activation, Tensor], None]
) -> Iterator[None]:
    """Within the block, each forward pass hands the outputs of the named modules to ``receive``.

    ``receive`` runs inside the hook, before the network goes on: what it computes cannot be spoilt by a later
    in-place operation, and nothing of the activation need be kept. The hooks come off when the block ends, however
    it ends.

    Args:
        network: any network; it is called by the caller.
        modules: paths of its modules, as `nn.Module.named_modules` gives them (``""`` is the network).
        receive: called with each tensor that a module puts out, in the order in which the modules finish. Outputs
            that are tuples, lists, mappings or objects with fields are looked into; others are passed over.

    >>> network = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    >>> shapes = {}
    >>> with capture(network, ["0", "1"], lambda which, tensor: shapes.update({which.module: tensor.shape})):
    ...     _ = network(torch.zeros(2, 3))
    >>> shapes
    {'0': torch.Size([2, 5]), '1': torch.Size([2, 5])}
    """
    calls: Counter[str] = Counter()

    def begin(*_: Any) -> None:
        calls.clear()

    def hand_over(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        call = calls[name]
        calls[name] += 1
        for path, tensor in tensors_in(output):
            receive(Activation(name, call, path), tensor)

    handles = [unwrapped(network).register_forward_pre_hook(begin)]
    try:
        for name in modules:
            module = module_at(network, name)
            handles.append(module.register_forward_hook(partial(hand_over, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(network: nn.Module, device: torch.device, name: str = "The network") -> Iterator[None]:
    """Within the block, the network is on ``device``, in evaluation mode and without autograd.

    Afterwards every module has its own training flag again, and the network is back on the device it came from.

    Args:
        network: any network.
        device: where it goes.
        name: for messages.

    Raises:
        NetworkError: it has no weights, or cannot be moved or set to evaluation mode.
    """
    training: dict[nn.Module, bool] = {}
    home: torch.device | None = None
    try:
        with naming_errors(f"{name} must run on {device} in evaluation mode, but to change to that raised"):
            tensors = [*network.parameters(), *network.buffers()]
            if any(tensor.is_meta for tensor in tensors):
                raise NetworkError(
                    f"{name} is on the device 'meta', where it has no weights. Create it on the CPU, or move it by "
                    "to_empty() and load its weights."
                )
            if is_exported(network):
                raise NetworkError(
                    f"{name} is an exported program: it has no evaluation mode, and no layers that can be observed. "
                    "Give the network that it was exported from."
                )
            homes = {tensor.device for tensor in tensors}
            # A frozen TorchScript module has no flag.
            modules = (module for module in modules_of(network).values() if hasattr(module, "training"))
            training = {module: module.training for module in modules}
            if len(homes) == 1:  # one that is spread over several devices stays where its owner put it
                network.to(device)
                (home,) = homes
            network.eval()
        with torch.no_grad(), keeping_buffers(network), watching_weights(network, name):
            # inference_mode() would hide the version counters that show an in-place change
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if home is not None:
            network.to(home)


def tensors_in(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's output, each with its path in it (``""`` for a bare tensor)."""
    if isinstance(output, Tensor):
        yield path, output
        return
    for key, value in _fields(output):
        yield from tensors_in(value, f"{path}.{key}" if path else str(key))


def _fields(output: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return output.items()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return zip(output._fields, output, strict=True)
    if isinstance(output, (tuple, list)):
        return enumerate(output)
    if hasattr(output, "__dataclass_fields__"):
        return ((name, getattr(output, name)) for name in output.__dataclass_fields__)
    return ()
