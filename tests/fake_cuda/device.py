"""A CUDA device that has shapes and types but no values, and a count of what would wait for it or copy from it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import cka_probe

CUDA = torch.device("cuda")

_SOURCES = str(Path(cka_probe.__file__).parent)
_TESTS = str(Path(__file__).parent)
_VALUES = {"_local_scalar_dense", "is_nonzero", "equal"}
_SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


class HostAccess(TorchDispatchMode):
    """Counts what the host reads of the device, by the place in our code and by its kind.

    The kinds are ``value`` (``.item()``, ``bool()``, ...), ``size`` (a shape that depends on values), ``copy``, ``copy
    ahead`` (non-blocking: the host goes on), ``stream`` (the host waits for all work so far) and ``event`` (it waits
    for the work up to an event).

    Args:
        value: the number that is read, so that the code goes on; a truth value is true.

    Attributes:
        found: (``file.py:function``, kind) -> how often.
    """

    def __init__(self, value: int = 1) -> None:
        super().__init__()
        self._value = value
        self.found: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str) -> None:
        """Count one, for the innermost function of ours that is under way."""
        self.found[_place(sys._getframe(1)), kind] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        kind = _kind(name, args, kwargs)
        if kind is not None:
            self.note(kind)
        if name not in _VALUES:
            return func(*args, **kwargs)
        # A condition holds, and on the CPU a number is 1: an optimizer divides by that of its steps.
        return self._value if kind is not None and name != "equal" and args[0].dtype != torch.bool else 1


def _kind(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if name == "copy_":
        into, source = tensors[:2]
        ahead = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        return _copy(ahead) if source.is_cuda and not into.is_cuda else None
    if not any(value.is_cuda for value in tensors):
        return None
    if name == "_to_copy":
        to = kwargs.get("device")
        return _copy(kwargs.get("non_blocking")) if to is not None and torch.device(to).type == "cpu" else None
    if name in ("index", "index_put", "index_put_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return "size" if masks else None
    return "value" if name in _VALUES else "size" if name in _SIZES else None


def _copy(ahead: Any) -> str:
    return "copy ahead" if ahead else "copy"


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith((_SOURCES, _TESTS)) and path != __file__:
            return f"{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As Module.to() does it, but for exchanging the contents of two tensors, which fake ones refuse."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and (moved := function(parameter.detach())).device != parameter.device:
                part._parameters[key] = nn.Parameter(moved, parameter.requires_grad)
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else function(buffer)
    return module


@contextmanager
def fake_cuda(value: int = 1) -> Iterator[HostAccess]:
    """Within the block, tensors are fake; on ``torch.device("cuda")`` too, whether or not there is a GPU.

    Args:
        value: the number that is read of tensors on that device; a truth value is true.
    """
    access, mode = HostAccess(value), FakeTensorMode()  # its first instance imports what the patches would break

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            access.note("stream")

        def wait_event(self, event: Any) -> None:
            pass  # the device waits, not the host

        def query(self) -> bool:
            return False

    class Event:
        def record(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            access.note("event")

    def copied(tensor: Tensor, memo: Any) -> Tensor:
        own = tensor.detach().clone()
        return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            access.note("value")  # one copy, whatever its length
        return np.full(tuple(tensor.shape), value).tolist()

    def numpy(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            raise TypeError("can't convert a CUDA tensor to numpy")
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    randint, random_state = torch.randint, torch.get_rng_state()

    def without_generator(*args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        return randint(*args, **kwargs)  # there are no generators of the device

    generator = torch.Generator

    with pytest.MonkeyPatch.context() as patch:
        # It draws again until no value is out of range, which a fake one never says.
        patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        patch.setattr(torch, "randint", without_generator)
        # The state is a real tensor, which nothing can be done with here.
        patch.setattr(torch, "get_rng_state", lambda: fake_state)
        patch.setattr(torch, "set_rng_state", lambda _: None)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        patch.setattr(torch.cuda, "synchronize", lambda device=None: access.note("stream"))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(FakeTensor, "record_stream", lambda tensor, stream: None, raising=False)
        patch.setattr(FakeTensor, "__deepcopy__", copied, raising=False)
        patch.setattr(FakeTensor, "tolist", tolist, raising=False)
        patch.setattr(FakeTensor, "numpy", numpy, raising=False)
        with mode, access:
            fake_state = torch.zeros(len(random_state), dtype=torch.uint8)
            yield access
    torch.set_rng_state(random_state)
