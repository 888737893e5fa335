"""Whether this torch can fake a GPU on this machine."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(scope="session", autouse=True)
def _writable_fake_tensors() -> None:
    """Older CUDA builds of torch (2.6 and 2.8, not 2.14) ask the driver before they write into a fake tensor."""
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda").copy_(torch.empty(1, device="cuda"))
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} fakes no GPU without a driver: {str(error).splitlines()[0]}")
