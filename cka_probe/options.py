"""The options that say what is seen: those that comparing and extracting share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Which images, layers and device, and where the results go."""

    out: Path
    """Folder for the results: new or empty."""

    data: str = "digits"
    """digits (bundled), a folder of images, or a data set of timm's: torch/cifar100, hfds/..., wds/..., tfds/..."""

    paired: str | None = None
    """A folder of images that are the partners of those in --data, by their paths: each model sees both."""

    views: Annotated[str, arg(name="view")] = "identity"
    """identity, gray, blur:SIGMA, jpeg:QUALITY, noise:STD, catvision, file.py:function; several with commas: each model
    is compared through each of them."""

    layers: str = "blocks"
    """blocks, stages, all, globs (layer*.1, **.attn), type:Conv2d; several with commas."""

    examples: int = 2048
    """Images to use: a random subset of that many, in a fixed order."""

    batch_size: int = 128
    """Images a forward pass."""

    seed: int = 0
    """Of the choice and order of the images, and of whatever is shuffled."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""

    amp: bool = False
    """Run the networks under autocast to bfloat16; Gram matrices and sums keep their precision."""

    workers: int | None = None
    """Processes that decode images; by default a core less than there are."""

    split: str | None = None
    """Part of the data: train, validation, or a name of its own. By default validation, where there is one."""

    data_dir: str | None = None
    """Where a data set such as torch/cifar100 lies."""

    download: bool = False
    """Fetch the data set where it can be."""

    image_size: int | None = None
    """Height and width for every model, in place of each one's own."""

    mean: tuple[float, ...] | None = None
    """Per channel, for every model, in place of each one's own."""

    std: tuple[float, ...] | None = None
    """Per channel, for every model, in place of each one's own."""

    resume: bool = False
    """Go on with the run that was begun in --out; where there is none, begin. The other options must be the same."""

    checkpoint_minutes: float = 5.0
    """Minutes between two saves of what is measured so far, from which a run can be resumed."""

    overwrite: bool = False
    """Replace the files of a run that is in --out already."""
