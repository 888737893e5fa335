"""The memory of contrastive representation distillation: an embedding of every training image for either network."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.distill.losses import crd_log_mean, crd_loss, unit_length
from cka_probe.distill.training.gathering import gathered, position

WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 128, 16384, 0.07, 0.5


class MemoryBank(nn.Module):
    """Embeds the features of both networks, and contrasts each image with a memory of the other network's.

    The memory's negatives are drawn from all other images; where there are fewer than 16,384, as many as there are.
    What the critic divides by is taken once, from the first batch. Memory and that are buffers, so that checkpoints
    keep them. They are the same on all processes: each remembers the images of all, and an image's negatives follow
    from the seed, the step and its place in the batch.

    Args:
        width: of the student's features.
        teacher_width: of the teacher's.
        images: in the training set, 2 or more.
        seed: of the negatives.
    """

    def __init__(self, width: int, teacher_width: int, *, images: int, seed: int) -> None:
        super().__init__()
        self._images, self._seed = images, seed
        self._negatives = min(NEGATIVES, images - 1)
        self._batches = 0  # so far
        self.embed = nn.Linear(width, WIDTH)
        self.embed_teacher = nn.Linear(teacher_width, WIDTH)
        for name in ("memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(images, WIDTH), dim=1))
            self.register_buffer(f"log_mean_of_{name}", torch.tensor(float("nan")))
        self.memory: Tensor
        self.teacher_memory: Tensor

    def forward(self, features: Tensor, teacher_features: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """The contrast of the student's embeddings with the teacher's memory, and the other way round.

        Args:
            features: (n, d₁) of the student.
            teacher_features: (n, d₂) of the teacher.
            indices: (n,) which training images they are.
        """
        student = unit_length(self.embed(features).float())
        teacher = unit_length(self.embed_teacher(teacher_features).float())
        rows, contrasts = self._rows(indices), {}
        for name, embedding, memory in (("crd", student, "teacher_memory"), ("crd_teacher", teacher, "memory")):
            with torch.autocast(embedding.device.type, enabled=False):
                # With all of the memory, as to gather 16,385 rows of it for each image takes more time and space; with
                # a copy, as the memory changes before the backward pass.
                cosines = (embedding @ self.get_buffer(memory).clone().T).gather(1, rows)
            log_mean = self.get_buffer(f"log_mean_of_{memory}")
            if self.training and not self._batches:
                means = gathered(crd_log_mean(cosines, temperature=TEMPERATURE)[None])
                log_mean.copy_(means.logsumexp(0) - log(len(means)))
            contrasts[name] = crd_loss(cosines, log_mean, temperature=TEMPERATURE)
        if self.training:
            self._batches += 1
            _remember(self.memory, indices, student.detach())
            _remember(self.teacher_memory, indices, teacher.detach())
        return contrasts

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
            key = np.random.SeedSequence((self._seed, self._batches, place)).generate_state(1, np.uint64)
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
