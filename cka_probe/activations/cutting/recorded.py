"""What a network's code handles while its forward pass is recorded: values that know what they were for one batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from torch import fx

from cka_probe.activations.hooks import tensors_in
from cka_probe.errors import NetworkError

PLAIN = (bool, int, float, str, type(None))
"""Attributes of these types are noted when a forward pass reads them."""

QUESTIONS: dict[str, Callable[[Any], Any]] = {"bool": bool, "int": int, "float": float, "len": len}
"""What Python asks of a value, by name."""


class Source(Protocol):
    """What records the values."""

    values: dict[fx.Node, Any]

    def answer(self, proxy: fx.Proxy, question: str) -> Any:
        """What Python asks of a value."""

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one operation and run it."""


class Recorded(fx.Proxy):
    """A recorded value; Python sees the length and the attributes that it has for the batch."""

    tracer: Source  # type: ignore[assignment]

    def __getattr__(self, k: str) -> Any:
        if callable(getattr(self.tracer.values[self.node], k)):
            return partial(self._method, k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self))])  # type: ignore[index]  # torch.fx adds it

    def __len__(self) -> int:
        return int(self.tracer.answer(self, "len"))

    def __index__(self) -> int:
        return int(self.tracer.answer(self, "int"))

    def __int__(self) -> int:
        return int(self.tracer.answer(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.answer(self, "float"))

    def __hash__(self) -> int:
        value = self.tracer.values[self.node]
        return hash(value) if is_plain(value) else id(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[[Recorded, Any], Any]:
    def method(self: Recorded, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Recorded, f"__{_name}__", _in_place(_name))


def expect(value: Any, question: str, answer: Any) -> None:
    """Raise where a batch is not like the one that the network was cut on."""
    found = QUESTIONS[question](value)
    if found != answer:
        raise NetworkError(
            f"The network's own code asks something of the shapes ({question}) that was {answer!r} for the example it "
            f"was cut on, but is {found!r} for this batch. Cut it on an example of this batch's shape."
        )


def holds_tensor(value: Any) -> bool:
    """Whether a tensor is in a value."""
    return next(tensors_in(value), None) is not None


def is_plain(value: Any) -> bool:
    """Whether a value is a flag, a number, text or a tuple of such."""
    return isinstance(value, PLAIN) or (type(value) is tuple and all(is_plain(part) for part in value))
