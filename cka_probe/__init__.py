"""cka-probe: where two vision networks agree, layer by layer, and what to do about it.

import cka_probe as cp
sim = cp.compare(["zoo:cnn", "zoo:vit"], data="digits")
sim.between("zoo:cnn", "zoo:vit").values
"""

from __future__ import annotations

import lazy_loader

# The names stand in __init__.pyi. Each is loaded on first use: --help needs neither torch nor matplotlib.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
