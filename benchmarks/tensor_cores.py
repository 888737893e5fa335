"""What tensor cores would do to CKA: features of a GPU's width are rounded to TF32 here too, and compared with float64.

    python benchmarks/tensor_cores.py [SPEC ...] [--data DATA] [--layers SELECTION]

Tells the largest and the mean error over all pairs of layers, for TF32 by rounding and by cutting digits off, as
hardware may do either.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cka_probe as cp
from cka_probe.activations import features
from cka_probe.estimation import kernels


def cut(x: Tensor) -> Tensor:
    """Float32 -> its first 11 significant bits."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """Float32 -> the nearest with 11 significant bits."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def exact_product(x: Tensor) -> kernels.Product:
    """A product that is never precise enough, so that float64 is used."""
    return kernels.Product(x, torch.zeros(1), lambda *_: False, (len(x), x.shape[1]))


def coarse_product(coarser: Callable[[Tensor], Tensor]) -> Callable[[Tensor], kernels.Product]:
    """The product of a GPU: in TF32, by ``coarser``, where the features are wide."""

    def product(x: Tensor) -> kernels.Product:
        wide = x.shape[1] >= kernels._TENSOR_CORE_WIDTH
        return kernels.uncentered_product(coarser(x.contiguous()) if wide else x)

    return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["zoo:cnn", "zoo:vit", "zoo:mlp"])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--layers", default="blocks,type:Conv2d,type:Linear")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()

    def values() -> np.ndarray:
        found = cp.compare(options.models, data=options.data, layers=options.layers, examples=options.examples)
        return found.values

    products = features._PRODUCTS
    plain = dict(products)
    products.update(uncentered=exact_product, centered=exact_product)
    exact = values()
    rows = []
    for name, coarser in (("float32", lambda x: x), ("rounded to TF32", rounded), ("cut to TF32", cut)):
        products.update(plain, uncentered=coarse_product(coarser))
        error = np.abs(values() - exact)
        found = {"largest error": f"{np.nanmax(error):.1e}", "mean error": f"{np.nanmean(error):.1e}"}
        rows.append({"products": name, **found, "layers": len(error)})
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
