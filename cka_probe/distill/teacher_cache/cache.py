"""An entry of the cache: the logits and features of one teacher, for one way of training."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cka_probe.distill.teacher_cache.key import name_of
from cka_probe.distill.teacher_cache.records import DIGEST, Records
from cka_probe.errors import OutputError
from cka_probe.runtime.files import reason

logger = logging.getLogger(__name__)

KEY, ACCURACIES = "key.json", "accuracies.json"


@dataclass(frozen=True)
class Output:
    """One of the outputs that are stored.

    Attributes:
        name: ``"logits"``, or of features their layer and how it is pooled.
        shape: for a batch.
        dtype: as it is stored.
        given: as it is computed, and handed out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    given: torch.dtype

    @property
    def size(self) -> int:
        """Bytes for a batch."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def folder(self) -> str:
        """Its folder in the entry."""
        kind = str(self.dtype).removeprefix("torch.")
        return re.sub(r"[^\w.-]", "_", f"{self.name}-{'x'.join(map(str, self.shape))}-{kind}")

    def to_bytes(self, value: Tensor) -> bytes:
        """A value as it is stored."""
        return value.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()

    def from_bytes(self, content: bytearray) -> Tensor:
        """The value, on the CPU."""
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape).to(self.given)


class TeacherCache:
    """The outputs of a teacher at each step of a training.

    Args:
        root: folder of all entries.
        key: what decides the values; see `cka_probe.distill.teacher_cache.key.key_of`.

    Attributes:
        folder: of the entry.
        read_steps: steps whose outputs were there.
        computed_steps: steps whose outputs were not.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """

    def __init__(self, root: Path, key: Mapping[str, Any]) -> None:
        self.folder = root / name_of(key)
        self.read_steps = self.computed_steps = 0
        self._outputs: dict[str, tuple[Output, Records]] = {}
        self._writes = True
        try:
            self._open(key)
        except OSError as error:
            raise OutputError(f"The teacher's outputs cannot be kept in {self.folder}: {reason(error)}") from error

    def expect(self, outputs: Sequence[Output], steps: int, epochs: int) -> None:
        """Say which outputs there are, and log how much they take.

        Args:
            outputs: in the order in which `read` gives them.
            steps: an epoch.
            epochs: of the run.

        Raises:
            OutputError: the disk has no room for them.
        """
        self._outputs = {output.name: (output, Records(self.folder / output.folder, output.size)) for output in outputs}
        stored = sum(records.stored for _, records in self._outputs.values())
        needed = sum(output.size + DIGEST for output in outputs) * steps * epochs
        logger.info(
            "Teacher cache in %s: the whole run needs %s (%s), of which %s are stored already.",
            self.folder, _amount(needed), " and ".join(self._outputs), _amount(min(stored, needed)),
        )  # fmt: skip
        free = shutil.disk_usage(self.folder).free
        if needed - stored > free:
            raise OutputError(
                f"The teacher's outputs need {_amount(needed - stored)} more in {self.folder}, but {_amount(free)} are "
                "free. Name another folder (--teacher-cache), halve them by --teacher-cache-dtype float16, or train "
                "without a cache."
            )

    def read(self, epoch: int, step: int, images: bytes) -> list[Tensor] | None:
        """The outputs of a step, on the CPU; None if one of them is missing or damaged.

        Args:
            epoch: from 0.
            step: from 0.
            images: a checksum of the images of the step, by `checksum`.
        """
        found = []
        for output, records in self._outputs.values():
            content = records.read(epoch, step, images)
            if content is None:
                self.computed_steps += 1
                return None
            found.append(output.from_bytes(content))
        self.read_steps += 1
        return found

    def write(self, epoch: int, step: int, images: bytes, values: Sequence[Tensor]) -> list[Tensor]:
        """Store the outputs of a step.

        Returns:
            The outputs as `read` will give them, where they were.
        """
        given = []
        for value, (output, records) in zip(values, self._outputs.values(), strict=True):
            content = output.to_bytes(value)
            given.append(value if output.dtype == output.given else output.from_bytes(bytearray(content)).to(value))
            if self._writes:
                try:
                    records.write(epoch, step, images, content)
                except OSError as error:
                    self._writes = False
                    logger.warning("The teacher's outputs are no longer kept: %s", reason(error))
        return given

    def accuracy(self, which: str) -> dict[str, Any] | None:
        """An accuracy of the teacher that was measured before."""
        found: dict[str, Any] | None = (_read(self.folder / ACCURACIES) or {}).get(which)
        return found

    def keep_accuracy(self, which: str, values: Mapping[str, Any]) -> None:
        """Keep an accuracy of the teacher."""
        try:
            _write(self.folder / ACCURACIES, {**(_read(self.folder / ACCURACIES) or {}), which: dict(values)})
        except OSError as error:
            logger.warning("The teacher's accuracy is not kept: %s", reason(error))

    def _open(self, key: Mapping[str, Any]) -> None:
        path = self.folder / KEY
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise OutputError(
                    f"{self.folder} must be an entry of a teacher cache, but holds other files. Name another folder "
                    "(--teacher-cache)."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, key)
        elif _read(path) != key:
            raise OutputError(
                f"{path} must hold the key of this entry, but holds another one. Name another folder (--teacher-cache)."
            )


def checksum(images: Tensor) -> bytes:
    """Of a batch of uint8 images on the CPU."""
    return zlib.crc32(images.contiguous().numpy().data).to_bytes(4, "little")


def _read(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is none, or it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, so that others see all of it or nothing."""
    stage = path.with_name(f".{path.name}.{os.getpid()}")
    stage.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    stage.replace(path)


def _amount(count: float) -> str:
    """Bytes for a reader.

    >>> _amount(2.5e9), _amount(40_000)
    ('2.50 GB', '0.04 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
