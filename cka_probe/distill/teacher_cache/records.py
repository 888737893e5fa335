"""Records of fixed size in a file an epoch, each with a checksum: written in any order, by several runs at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGEST = 8
"""Bytes of a checksum."""


class Records:
    """The records of one kind of output.

    Where two runs write the same record, both write the same bytes, so that neither needs to wait. A record that is
    missing, was written in part or is damaged is found by its checksum.

    Args:
        folder: of the files; made with the first record.
        size: bytes of a record, without its checksum.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def read(self, epoch: int, step: int, key: bytes) -> bytearray | None:
        """A record; None if it is not there, is damaged, or was written for another key.

        Args:
            epoch: from 0.
            step: from 0.
            key: what the record belongs to.
        """
        try:
            with self._file(epoch).open("rb") as file:
                file.seek(step * (self.size + DIGEST))
                content = bytearray(file.read(self.size + DIGEST))
        except FileNotFoundError:
            return None
        values, digest = content[: self.size], content[self.size :]
        return values if digest == self._digest(values, epoch, step, key) else None

    def write(self, epoch: int, step: int, key: bytes, values: bytes) -> None:
        """Write a record.

        Raises:
            OSError: it cannot be written.
        """
        assert len(values) == self.size
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(epoch)
        path.touch()
        with path.open("r+b") as file:
            file.seek(step * (self.size + DIGEST))
            file.write(values + self._digest(values, epoch, step, key))

    @property
    def stored(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.folder.glob("epoch-*.bin")) if self.folder.is_dir() else 0

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch + 1:05d}.bin"

    @staticmethod
    def _digest(values: bytes | bytearray, epoch: int, step: int, key: bytes) -> bytes:
        digest = hashlib.blake2b(values, digest_size=DIGEST)
        digest.update(f"{epoch} {step} ".encode() + key)
        return digest.digest()
