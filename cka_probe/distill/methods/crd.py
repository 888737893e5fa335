"""Contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699)."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor, nn
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
from cka_probe.distill.training.gathering import gathered, position
from cka_probe.errors import DataError

WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5


class CRD(Method):
    """Cross-entropy, and the contrast of each image's embedding with a memory of the other network's.

    The memory holds an embedding of every training image for either network. Its negatives are drawn from all other
    images; where there are fewer than 16,384, as many as there are. What the critic divides by is taken once, from the
    first batch. Memory and that are buffers, so that checkpoints keep them. They are the same on all processes: each
    remembers the images of all, and an image's negatives follow from the seed, the step and its place in the batch.
    """

    summary = (
        "Contrastive representation distillation (Tian et al. 2020): each image's embedding against a memory of others."
    )
    options = ("feature_weight",)

    needs = Needs(features=True)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.student_layers, self.teacher_layers = map(tuple, last_stages(setting))
        self._weight = feature_weight(setting.config, 0.8)
        self._images = setting.images
        if self._images < 2:
            raise DataError("--method crd contrasts training images, but there is only one. Give it more images.")
        self._negatives = min(NEGATIVES, setting.images - 1)
        self._batches = 0  # so far
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
        rows = self._rows(seen.indices)
        for name, embedding, memory in (("crd", student, "teacher_memory"), ("crd_teacher", teacher, "memory")):
            with torch.autocast(embedding.device.type, enabled=False):
                # With all of the memory, as to gather 16,385 rows of it for each image takes more time and space; with
                # a copy, as the memory changes before the backward pass.
                cosines = (embedding @ self.get_buffer(memory).clone().T).gather(1, rows)
            log_mean = self.get_buffer(f"log_mean_of_{memory}")
            if self.training and not self._batches:
                means = gathered(crd_log_mean(cosines, temperature=TEMPERATURE)[None])
                log_mean.copy_(means.logsumexp(0) - log(len(means)))
            parts[name] = self._weight * crd_loss(cosines, log_mean, temperature=TEMPERATURE)
        if self.training:
            self._batches += 1
            _remember(self.memory, seen.indices, student.detach())
            _remember(self.teacher_memory, seen.indices, teacher.detach())
        return parts

    def get_extra_state(self) -> int:
        """How many batches there were; PyTorch puts it into the state beside the buffers."""
        return self._batches

    def set_extra_state(self, state: int) -> None:
        """Put back what `get_extra_state` gave."""
        self._batches = state

    def _rows(self, indices: Tensor) -> Tensor:
        """For each image the rows of the memory that it meets, (n, 1 + negatives): its own, then those drawn."""
        generator, first = torch.Generator(indices.device), position()[0] * len(indices)
        rows = []
        for place in range(first, first + len(indices)):
            key = np.random.SeedSequence((self.config.seed, self._batches, place)).generate_state(1, np.uint64)
            generator.manual_seed(int(key[0]))
            rows.append(torch.randint(self._images - 1, (self._negatives,), generator=generator, device=indices.device))
        own, drawn = indices[:, None], torch.stack(rows)
        # Drawn among the M - 1 others: those from the own index on are moved up by one.
        return torch.cat([own, drawn + (drawn >= own)], 1)


@torch.no_grad()
def _remember(memory: Tensor, indices: Tensor, embedding: Tensor) -> None:
    """Move the memory of some images half-way to their embeddings, on every process alike."""
    indices, embedding = gathered(indices), gathered(embedding)
    moved = MOMENTUM * memory[indices] + (1 - MOMENTUM) * embedding
    memory[indices] = F.normalize(moved, dim=1)
