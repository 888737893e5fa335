"""Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from cka_probe.distill.losses import crd_log_mean, crd_loss
from cka_probe.distill.methods.method import (
    Method,
    Needs,
    Seen,
    Setting,
    feature_weight,
    last_stages,
    pooled,
    pooled_width,
)

WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5


class CRD(Method):
    """Cross-entropy, and the contrast of each image's embedding with a memory of the other network's.

    The memory holds an embedding of every training image for either network. Its negatives are drawn from all other
    images; where there are fewer than 16,384, as many as there are. What the critic divides by is taken once, from the
    first batch (of the first process). Memory and that are buffers, so that checkpoints keep them.
    """

    summary = (
        "Contrastive representation distillation (Tian et al. 2020): each image's embedding against a memory of others."
    )

    needs = Needs(features=True)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.student_layers, self.teacher_layers = map(tuple, last_stages(setting))
        self._weight = feature_weight(setting.config, 0.8)
        self._images = setting.images
        self._negatives = min(NEGATIVES, setting.images - 1)
        self._has_mean = False
        self.embed = nn.Linear(pooled_width(self.student_layers[0]), WIDTH)
        self.embed_teacher = nn.Linear(pooled_width(self.teacher_layers[0]), WIDTH)
        for name in ("memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(setting.images, WIDTH), dim=1))
            self.register_buffer(f"log_mean_of_{name}", torch.tensor(float("nan")))
        self.memory: Tensor
        self.teacher_memory: Tensor

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        parts = super().forward(seen)
        student = F.normalize(self.embed(pooled(seen.taken[0], self.student_layers[0])).float(), dim=1)
        teacher = F.normalize(self.embed_teacher(pooled(seen.teacher_taken[0], self.teacher_layers[0])).float(), dim=1)
        # Drawn among the M - 1 others: those from the own index on are moved up by one.
        own = seen.indices[:, None]
        drawn = torch.randint(self._images - 1, (len(own), self._negatives), device=own.device)
        rows = torch.cat([own, drawn + (drawn >= own)], 1)
        for name, embedding, memory in (("crd", student, "teacher_memory"), ("crd_teacher", teacher, "memory")):
            with torch.autocast(embedding.device.type, enabled=False):
                # With all of the memory, as to gather 16,385 rows of it for each image takes more time and space; with
                # a copy, as the memory changes before the backward pass.
                cosines = (embedding @ self.get_buffer(memory).clone().T).gather(1, rows)
            log_mean = self.get_buffer(f"log_mean_of_{memory}")
            if self.training and not self._has_mean:
                log_mean.copy_(_of_first_process(crd_log_mean(cosines, temperature=TEMPERATURE)))
            parts[name] = self._weight * crd_loss(cosines, log_mean, temperature=TEMPERATURE)
        if self.training:
            self._has_mean = True
            _remember(self.memory, seen.indices, student.detach())
            _remember(self.teacher_memory, seen.indices, teacher.detach())
        return parts

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._has_mean = not self.get_buffer("log_mean_of_memory").isnan().item()


def _of_first_process(value: Tensor) -> Tensor:
    """The value that the first process has."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(value, 0)
    return value


@torch.no_grad()
def _remember(memory: Tensor, indices: Tensor, embedding: Tensor) -> None:
    """Move the memory of some images half-way to their embeddings, on every process alike."""
    if dist.is_available() and dist.is_initialized():
        indices, embedding = _gathered(indices), _gathered(embedding)
    moved = MOMENTUM * memory[indices] + (1 - MOMENTUM) * embedding
    memory[indices] = F.normalize(moved, dim=1)


def _gathered(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
