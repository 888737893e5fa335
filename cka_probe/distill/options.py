"""Options that training and evaluation share, and those of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cka_probe.errors import SpecError
from cka_probe.probing.options import DataSet, Hardware
from cka_probe.runtime.ranges import COUNT, SEED, Range


@dataclass(frozen=True, kw_only=True)
class TrainingData(DataSet):
    """Which images."""

    data: str = "digits"
    """digits (bundled), a folder of class folders, or a data set of timm's: torch/cifar100, hfds/... A folder without
    train and val or test keeps a tenth of its images for the test."""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Hardware):
    """Device and precision."""

    bf16: bool = False
    """Run the networks under autocast to bfloat16."""

    fp16: bool = False
    """Run the networks under autocast to float16, with gradient scaling in training: for CUDA GPUs without bfloat16,
    such as T4 and V100. Excludes --bf16."""

    def check(self) -> None:
        """As `Options.check`; there is one type at most."""
        super().check()
        if self.bf16 and self.fp16:
            raise SpecError(
                "--bf16 and --fp16 exclude each other. Choose one. If a recipe or --config sets the other, switch it "
                "off: --no-bf16 or --no-fp16."
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation(MixedPrecision, TrainingData):
    """On which images, and how."""

    by: Literal["logits", "knn", "linear", "fewshot"] = "logits"
    """logits: the network's own classifier. The others use the features that the classifier gets: knn, the --neighbours
    nearest training images; linear, logistic regression on the training images; fewshot, episodes drawn from the
    evaluated images."""

    neighbours: Annotated[int, COUNT] = 20
    """Number of training images that vote, with --by knn."""

    shots: Annotated[int, COUNT] = 5
    """Images per class whose mean is its prototype, with --by fewshot."""

    ways: Annotated[int, Range(2, 10**6, whole=True)] = 50
    """Classes per episode, with --by fewshot; all, if there are fewer."""

    episodes: Annotated[int, Range(2, 10**6, whole=True)] = 200
    """Number of episodes, of one query per class, with --by fewshot."""

    seed: Annotated[int, SEED] = 0
    """Seed of the episodes."""

    data: str = "digits"
    """digits (bundled), a folder of class folders, or a data set of timm's: torch/cifar100, hfds/... Of a folder, test/
    or val/ if available, else all images. A run's student is evaluated on the run's own test images."""

    batch_size: Annotated[int, COUNT] = 128
    """Images per forward pass."""
