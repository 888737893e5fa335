"""The crops that a network can see."""

from __future__ import annotations

import logging

import torch

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import evaluating
from cka_probe.errors import NetworkError, SpecError
from cka_probe.images.multi_crop import GRID, Crops, scaled
from cka_probe.networks.models import Subject

logger = logging.getLogger(__name__)

MOST_CROPS = 16
"""An image."""


def crops_for(student: Subject, crops: str | None, patches: str | None) -> tuple[Crops, Crops]:
    """Crops and patches of the sizes that are asked for, else in proportion to the student's images.

    A network of one size alone, as most transformers, gets by default two crops of that size, and no patches.

    Args:
        student: on its device.
        crops: what ``--crops`` says.
        patches: what ``--patches`` says.

    Raises:
        SpecError: the student cannot run on what is asked for.
    """
    own = min(student.preprocessing.size[1:])
    large, small = scaled(own)
    if not (_runs_at(student, large.size) and _runs_at(student, small.size)):
        large, small = Crops(2, own), Crops(0, own)
    chosen = (
        Crops.parse(crops, "--crops", MOST_CROPS) if crops is not None else large,
        Crops.parse(patches, "--patches", GRID**2) if patches is not None else small,
    )
    for asked, option, found in ((crops, "--crops", chosen[0]), (patches, "--patches", chosen[1])):
        if asked is not None and found.count and not _runs_at(student, found.size):
            raise SpecError(
                f"{student.name!r} cannot run on {found.size} × {found.size} px ({option}). Use "
                f"{found.count}x{own}, or build it for images of any size (timm's vision transformers: "
                "dynamic_img_size=True)."
            )
    logger.info(
        "Of each image the teacher sees the whole, %d × %d px, and the student crops %s and patches %s.",
        *student.preprocessing.size[1:], *chosen,
    )  # fmt: skip
    return chosen


def _runs_at(student: Subject, size: int) -> bool:
    device = next(student.network.parameters()).device
    images = torch.zeros(2, student.preprocessing.size[0], size, size, device=device)
    with evaluating(student.network, device, repr(student.name)):
        try:
            run_network(student.network, images, f"{student.name!r} must run on crops, but", key=(0,))
        except NetworkError:
            return False
    return True
