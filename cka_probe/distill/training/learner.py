"""What is trained: the student and what the method trains beside it, with its optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cka_probe.activations.taps import Taps
from cka_probe.distill.methods.loss import MethodLoss, StepInputs
from cka_probe.errors import NetworkError, SpecError
from cka_probe.runtime.ranges import shown

if TYPE_CHECKING:
    from cka_probe.distill.config import Training


class Learner(nn.Module):
    """Student and loss as one module, so that data-parallel training sees all their gradients.

    Args:
        student: the network.
        loss: of the method, with its branches or projections.
        copies: take copies of the student's activations, as it changes some of them in place.
        name: of the student, for messages.
        compiled: run the student compiled.

    Attributes:
        place: where the training is, for messages.
        right: how many images of the last batch the student named right; None where labels are mixed.
    """

    def __init__(
        self, student: nn.Module, loss: MethodLoss, *, copies: bool, name: str = "student", compiled: bool = False
    ) -> None:
        super().__init__()
        self.place = "in training"
        self.right: Tensor | None = None
        self._name = name
        self.student = student
        self.loss = loss
        classes = loss.classes if loss.method.uses_labels else None
        self.taps = Taps(student, loss.student_layers, name=name, compiled=compiled, classes=classes)
        if copies:
            self.taps.keep_copies()

    def forward(
        self,
        images: Tensor | tuple[Tensor, ...],
        target: Tensor,
        indices: Tensor,
        teacher_logits: Tensor,
        teacher_taken: list[Tensor],
    ) -> dict[str, Tensor]:
        """The parts of the loss on a batch; see `StepInputs` for the arguments. Of crops, ``images`` are each kind."""
        kinds = images if isinstance(images, tuple) else (images,)
        runs = [self.taps.run(kind, self.place) for kind in kinds]
        logits = runs[0][0]
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise NetworkError(
                f"The logits of {self._name!r} have no gradients, so that it cannot be trained: its forward pass turns "
                "them off (torch.no_grad, inference_mode or detach)."
            )
        taken = tuple([in_single(value) for value in values] for _, values in runs)
        named = target.ndim == 1 and self.loss.method.uses_labels
        self.right = (logits.detach().argmax(1) == target).sum() if named else None
        seen = StepInputs(
            kinds[0], target, indices, logits.float(), taken[0], teacher_logits.float(), teacher_taken, taken
        )
        parts: dict[str, Tensor] = self.loss(seen)
        return parts


def in_single(activation: Tensor) -> Tensor:
    """An activation in the type of a method's own weights; autocast to bfloat16 takes those of its type as they are.

    Those in float16 become float32, as their squares and sums may overflow.
    """
    kept = activation.dtype == torch.bfloat16 and torch.is_autocast_enabled(activation.device.type)
    return activation if kept else activation.float()


def make_optimizer(student: nn.Module, config: Training) -> torch.optim.Optimizer:
    """Timm's optimizer over the student's parameters; norms, biases and what timm exempts get no weight decay.

    Raises:
        SpecError: there is no such optimizer.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = config.optimizer.lower()
    try:
        # Nesterov's is a way of using momentum: without any, timm's sgd is the plain one.
        nesterov = (get_optimizer_info(name.rpartition("_")[2]).defaults or {}).get("nesterov", False)
        plain = {"nesterov": False} if nesterov and config.momentum == 0 else {}
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            student, name, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum, **plain
        )
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ImportError) as error:
        close = get_close_matches(name, list_optimizers(), n=5)
        hint = f" Close names: {', '.join(close)}." if close and name not in close else ""
        raise SpecError(
            f"--optimizer must be one of timm's, such as adamw, lamb or sgd, but is {shown(config.optimizer)}: "
            f"{str(error).strip().rstrip('.')}.{hint}"
        ) from error
    return optimizer


def try_optimizer(config: Training) -> None:
    """Raise a SpecError where there is no such optimizer, or it cannot take a step."""
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(layer, config)
    layer(torch.ones(2, 2)).square().mean().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        raise SpecError(
            f"--optimizer must be one that needs gradients alone, such as adamw, lamb or sgd, but "
            f"{shown(config.optimizer)} raised: {str(error).strip().rstrip('.')}."
        ) from error


def extend_optimizer(optimizer: torch.optim.Optimizer, method: nn.Module, config: Training) -> None:
    """Let the optimizer update a method's parameters too, from their first step on; nothing is restarted."""
    from timm.optim import param_groups_weight_decay

    for group in param_groups_weight_decay(method, config.weight_decay):
        if group["params"]:
            optimizer.add_param_group({**group, "lr": config.lr, "initial_lr": config.lr})


def make_schedule(optimizer: torch.optim.Optimizer, config: Training, updates: int, done: int) -> Any:
    """Timm's schedule, a step an update.

    It holds nothing but functions of the update's number, so it is rebuilt when groups join the optimizer. The
    cosine starts when the warm-up is over, at the learning rate of the options, and ends with the run. Timm's own
    program starts it with the run, so that the rate drops where a long warm-up ends.

    Args:
        optimizer: with all its groups.
        config: schedule, warm-up, rates.
        updates: an epoch.
        done: updates so far.
    """
    from timm.scheduler import create_scheduler_v2

    cosine = config.schedule == "cosine"
    after = config.epochs - (config.warmup_epochs if cosine else 0)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched={"none": "constant"}.get(config.schedule, config.schedule),
        num_epochs=max(after, 1 / updates),
        decay_epochs=config.decay_epochs,
        decay_rate=0.1,
        min_lr=min(config.min_lr, config.lr),
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        warmup_prefix=cosine,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    schedule.step_update(done)
    return schedule


@contextmanager
def explaining_batch_norm(images: int) -> Iterator[None]:
    """Within the block, an error of batch norm over one value says what to do."""
    try:
        yield
    except (ValueError, NetworkError) as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SpecError(
            "Batch norm needs at least 2 values a channel in training, but the network, or an exit branch, has a layer "
            f"that sees only one: a map of 1 × 1, or a vector, of {images} image. Use --batch-size 2 or more."
        ) from error
