"""The plan of a store: which sample each row stands for, fixed before any work starts.

A plan is columnar, so that millions of keys cost no Python object each: keys as one run of
UTF-8 bytes, and a sorted table of 64-bit key hashes that finds a row without a dictionary.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .errors import SettingsError, StoreFormatError

__all__ = ["NO_TARGET", "Plan"]

NO_TARGET = -1
"""The target of a sample whose source knows no class."""

_COLUMNS = {
    "key_bytes": np.uint8,
    "key_ends": np.int64,
    "targets": np.int32,
    "hashes": np.uint64,
    "hash_rows": np.int64,
}


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows and their keys.

    Attributes:
        key_bytes: uint8, the UTF-8 bytes of all keys, end to end.
        key_ends: int64 [N], where each row's key ends.
        targets: int32 [N], index of the class that the source gives the sample, or `NO_TARGET`.
        hashes: uint64 [N], key hashes in ascending order.
        hash_rows: int64 [N], the row of each hash.
    """

    key_bytes: NDArray[np.uint8]
    key_ends: NDArray[np.int64]
    targets: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    hash_rows: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Iterable[tuple[str, int]]) -> Self:
        """Lay samples, (key, target) in order, out in rows.

        Raises:
            SettingsError: two samples have one key, or a key cannot be stored.
        """
        encoded: list[bytes] = []
        targets: list[int] = []
        for key, target in samples:
            try:
                encoded.append(key.encode())
            except UnicodeEncodeError as error:
                raise SettingsError(
                    f"{key!r}: the file name is not valid UTF-8; rename the file"
                ) from error
            targets.append(target)
        unordered = np.array([_hash(key) for key in encoded], dtype=np.uint64)
        order = np.argsort(unordered, kind="stable")
        hashes = unordered[order]
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            first, second = encoded[order[place]], encoded[order[place + 1]]
            if first == second:
                raise SettingsError(
                    f"the source has two samples with the key {first.decode()!r} "
                    f"(number {order[place]} and {order[place + 1]}); keys must be unique: "
                    "rename one or remove it"
                )
        return cls(
            np.frombuffer(b"".join(encoded), dtype=np.uint8),
            np.cumsum([len(key) for key in encoded], dtype=np.int64),
            np.array(targets, dtype=np.int32),
            hashes,
            order.astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        """The key of a row."""
        start = self.key_ends[row - 1] if row else 0
        return self.key_bytes[start : self.key_ends[row]].tobytes().decode()

    def keys(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Keys of a run of rows, in order."""
        return (self.key(row) for row in range(start, len(self) if stop is None else stop))

    def row(self, key: str) -> int | None:
        """The row of a key, or None where no row has it."""
        wanted = np.uint64(_hash(key.encode(errors="surrogatepass")))
        place = int(np.searchsorted(self.hashes, wanted))
        while place < len(self.hashes) and self.hashes[place] == wanted:
            row = int(self.hash_rows[place])
            if self.key(row) == key:
                return row
            place += 1
        return None

    def digest(self) -> str:
        """SHA-256 of the columns, whatever file they are kept in."""
        digest = hashlib.sha256()
        for name in _COLUMNS:
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()

    def changes(self, now: Self) -> str:
        """What differs between this plan and a later one, in words."""
        gone = [key for key in self.keys() if now.row(key) is None]
        new = [key for key in now.keys() if self.row(key) is None]  # noqa: SIM118 - no mapping
        said = [
            f"{len(keys)} {what} (such as {keys[0]!r})"
            for what, keys in (("samples gone", gone), ("new samples", new))
            if keys
        ]
        return " and ".join(said) or "the samples have another order or other classes"

    def to_bytes(self) -> bytes:
        """The plan as a numpy `.npz` file; equal plans give equal bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in _COLUMNS})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read what `to_bytes` wrote; `where` names the file in errors.

        Raises:
            StoreFormatError: the bytes are no plan.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as columns:
                plan = cls(**{name: columns[name] for name in _COLUMNS})
        except Exception as error:
            raise StoreFormatError(f"{where}: not the plan of a label store: {error}") from error
        for name, dtype in _COLUMNS.items():
            column = getattr(plan, name)
            if column.dtype != dtype or column.ndim != 1:
                raise StoreFormatError(
                    f"{where}: column {name!r}: expected one dimension of {np.dtype(dtype)}, "
                    f"got {column.ndim} of {column.dtype}"
                )
        rows = len(plan)
        if not rows == len(plan.targets) == len(plan.hashes) == len(plan.hash_rows):
            raise StoreFormatError(f"{where}: the columns differ in length")
        if not plan._is_consistent():
            raise StoreFormatError(f"{where}: not the plan of a label store: columns disagree")
        return plan

    def _is_consistent(self) -> bool:
        """Whether every key is text within the bytes, and the hash table covers every row once."""
        ends = self.key_ends
        if (np.diff(ends, prepend=0) < 0).any() or (ends[-1:] != len(self.key_bytes)).any():
            return False
        try:
            self.key_bytes.tobytes().decode()
        except UnicodeDecodeError:
            return False
        starts = self.key_bytes[ends[:-1][ends[:-1] < len(self.key_bytes)]]
        return not (
            (starts & 0xC0 == 0x80).any()  # a key would start inside a character
            or (self.hashes[1:] < self.hashes[:-1]).any()
            or (np.sort(self.hash_rows) != np.arange(len(self))).any()
        )


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
