"""A run that is not finished: what is measured so far, saved now and then, and taken up again."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cka_probe.errors import DataError, NetworkError, OutOfMemoryError, SpecError
from cka_probe.probing.duplicates import Duplicates
from cka_probe.probing.probe import Probe, StoredProbe, Sums
from cka_probe.runtime.folder.checkpoint import COMPARISON, load_checkpoint, save_checkpoint
from cka_probe.runtime.folder.run_folder import RunFolder
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)

_HASH = re.compile(r"'[0-9a-f]{64}'")
_MUCH_SECONDS = 30.0
_LOOK_SECONDS = 5.0  # how often the processes of a run ask rank 0 whether it is time


class Checkpoints:
    """When and where a run saves what it has so far.

    Args:
        folder: of the run, entered.
        kind: of the run, ``"compare"`` or ``"extract"``.
        options: what decides the result and is known before the networks ran; compared when a run is resumed.
        resume: go on from what is there, if anything is.
        minutes: between two saves.
    """

    def __init__(
        self, folder: RunFolder, kind: str, options: Mapping[str, Any], *, resume: bool, minutes: float
    ) -> None:
        if not minutes >= 0:
            raise SpecError(f"checkpoint_minutes must be 0 or more, but is {minutes}.")
        self._folder, self._kind = folder, kind
        self._options = options
        self._resume = resume
        self._seconds = 60 * minutes
        self._started = self._saved = self._looked = time.monotonic()
        self.seconds_before = 0.0  # of the runs that this one goes on from
        self._round, self._stride = 0, 1
        self._settings_of_run: Callable[[], Mapping[str, Any]] = dict

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return {**self._options, **self._settings_of_run()}

    def load(self, settings: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """What `save` kept last; None where the run starts.

        Args:
            settings: returns what else decides the result.

        Raises:
            SpecError: the run was started with other settings.
            CheckpointError: nothing of it can be read.
        """
        self._settings_of_run = settings
        state = None
        if self._resume and self._folder.has_checkpoint:
            state = load_checkpoint(self._folder.checkpoints, COMPARISON)
        if state is None:
            self._folder.clear_checkpoints()
            return None
        before = state["settings"]
        changed = [
            f"{name} was {_short(before.get(name))} and is {_short(value)}"
            for name, value in self._settings.items()
            if before.get(name) != value and name != "images"
        ]
        if changed:
            raise SpecError(
                f"A run is resumed with what it was started with, but {'; '.join(changed)}. Give the same, or start "
                "over with --overwrite."
            )
        if before.get("images") != self._settings.get("images"):
            raise SpecError(
                "The images have changed since the run was started: files of the same names have other sizes or "
                "contents. Put the earlier ones back, or start over with --overwrite."
            )
        self.seconds_before = state["seconds"]
        logger.info("Resuming after batch %d.", state["batches"])
        return state

    def due(self, world: World) -> bool:
        """Whether to save now, the same on all processes; asked after each round of batches."""
        if world.size == 1:
            return time.monotonic() - self._saved >= self._seconds
        self._round += 1
        if self._round % self._stride:
            return False
        now = time.monotonic()
        self._round = 0
        # Rank 0's clock counts. To ask it makes all wait for the slowest, so it is not done in every short round.
        self._stride, due = world.from_first(
            (
                max(1, self._stride * 2 if now - self._looked < _LOOK_SECONDS else self._stride // 2),
                now - self._saved >= self._seconds,
            )
        )
        self._looked = now
        return due

    def is_old(self) -> bool:
        """Whether much has come since the last save."""
        return time.monotonic() - self._saved > _MUCH_SECONDS

    def scratch(self) -> Path:
        """A folder for what is too large for a checkpoint.

        Raises:
            OutputError: it cannot be made.
        """
        return self._folder.scratch()

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep this, in place of what was kept before.

        Raises:
            OutputError: it cannot be written.
        """
        seconds = self.seconds_before + time.monotonic() - self._started
        save_checkpoint(self._folder, self._kind, {"settings": self._settings, "seconds": seconds, **state})
        self._saved = time.monotonic()


class RunState:
    """What a run has so far: brought together from its processes, saved where it is wanted, and taken up again.

    Args:
        partial: where it is saved; None where it is not.
        probes: of the subjects.
        measures: what takes their features, by name.
        world: the processes of the run.
        copies: the hashes of the images, where other passes over them have some already.

    Attributes:
        done: how many batches, from the first, are in it.
        copies: the hashes of the images.
    """

    def __init__(
        self,
        partial: Checkpoints | None,
        probes: Sequence[Probe | StoredProbe],
        measures: Mapping[str, Sums],
        world: World,
        copies: Duplicates | None = None,
    ) -> None:
        self._partial, self._probes, self._world = partial, probes, world
        self.copies = copies or Duplicates()
        self._measures: dict[str, Sums] = {**measures, "images": self.copies}
        self._whole = True  # no batch is half added
        self.done = 0

    def load(self, settings: Callable[[], Mapping[str, Any]]) -> int:
        """Take up what was saved, if anything was, and return how many batches are done.

        Args:
            settings: returns what decides the result; called when it is needed, as it reads all weights.

        Raises:
            SpecError: the run was started with other settings.
            CheckpointError: nothing of it can be read.
        """
        if self._partial is None:
            return 0
        state = self._partial.load(settings) if self._world.writes else None
        if state is not None:
            self.done = state["batches"]
            for probe, known in zip(self._probes, state["probes"], strict=True):
                probe.precision.ways, probe.features = dict(known["ways"]), dict(known["features"])
            for name, measure in self._measures.items():
                measure.load(state["measures"][name], self._partial.scratch(), self._world.device)
        self.done = self._world.from_first(self.done)
        if self.done:
            self.settle()
        return self.done

    def settle(self) -> None:
        """Give what rank 0's first batch decided to all processes."""
        for probe in self._probes:
            probe.precision.ways = self._world.from_first(probe.precision.ways)
        for measure in self._measures.values():
            measure.settle(self._world)

    def begin(self) -> None:
        """A batch is about to be added."""
        self._whole = False

    def end(self, done: int) -> None:
        """So many batches are in it now."""
        self.done = done
        self._whole = True

    def merge(self) -> None:
        """Bring what all processes have to rank 0."""
        if self._world.size > 1:
            for measure in self._measures.values():
                measure.merge(self._world)

    def save_if_due(self) -> None:
        """Save, where it is time."""
        if self._partial is not None and self._partial.due(self._world):
            self.merge()
            if self._world.writes:
                self._save(self._partial)

    def save_before_the_end(self) -> None:
        """Save what the evaluation and the drawing might lose, where that is worth the time; it is together already."""
        if self._partial is not None and self._world.writes and self._partial.is_old():
            self._save(self._partial)

    @contextmanager
    def saved_when_interrupted(self) -> Iterator[None]:
        """Within the block, an interrupt saves what is there, where that is whole and in this process.

        So does an error that may not come again: a network that raised, or an image that could not be read.
        """
        try:
            yield
        except (KeyboardInterrupt, NetworkError, DataError, OutOfMemoryError):
            if self._partial is not None and self._whole and self.done and self._world.size == 1:
                self._save(self._partial)
            raise

    def _save(self, partial: Checkpoints) -> None:
        probes = [{"ways": dict(p.precision.ways or {}), "features": dict(p.features)} for p in self._probes]
        measures = {name: measure.state(partial.scratch()) for name, measure in self._measures.items()}
        partial.save({"batches": self.done, "probes": probes, "measures": measures})


def fingerprint(network: nn.Module) -> str:
    """A hash of all parameters and buffers of a network, by which it is known again."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()[:16]


@torch.no_grad()
def _bytes_of(value: Any) -> bytes:
    """Of a tensor its values; of what else a state dict may hold (quantized weights are packed) what it shows."""
    if not isinstance(value, torch.Tensor) or is_lazy(value):
        return repr(value).encode()
    if value.is_quantized:
        value = value.dequantize()
    if value.layout != torch.strided:
        value = value.to_dense()
    return bytes(value.cpu().contiguous().flatten().view(torch.uint8).numpy())


def _short(value: Any) -> str:
    text = repr(value)
    if _HASH.fullmatch(text):
        return f"{text[:9]}…'"
    return text if len(text) <= 100 else f"{text[:97]}…"
