"""The global random states: seeded from whole numbers, and given back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators from a tuple of whole numbers."""
    # Two words, as 32 bits would meet again within some ten thousand steps.
    first, second = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    random.seed(first)
    np.random.seed(first)
    torch.default_generator.manual_seed(second << 32 | first)
    if torch.cuda.is_initialized():  # before that, torch.manual_seed would queue each call, with its stack
        torch.cuda.manual_seed_all(second << 32 | first)


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Within the block, the global generators may be seeded at will; afterwards they are as they were."""
    python, own = random.getstate(), np.random.get_state()
    # A device that is not initialized has no state yet, and to ask for it in a forked process would fail.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(own)
