"""Commit records: what makes a shard visible, and the columns that go with its rows.

A shard is three objects: its entries, a columnar table of its rows, and last the record that
names both with their hashes. The record is a function of the two objects alone, so whoever
writes it, whenever, writes the same bytes.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptStoreError
from .objects import ObjectRef, seal, unseal

__all__ = [
    "FAILED",
    "LABELLED",
    "RowTable",
    "ShardRecord",
]

LABELLED = 0
FAILED = 1


_COLUMNS: Mapping[str, tuple[type[np.generic], tuple[str, ...]]] = {
    "status": (np.uint8, ()),
    "sizes": (np.int32, ("2",)),
    "orientations": (np.uint8, ()),
    "boxes": (np.float64, ("4",)),
    "pooled_ids": (np.int32, ("K",)),
    "pooled_probabilities": (np.float32, ("K",)),
    "kl_quantization": (np.float32, ()),
    "kl_full": (np.float32, ()),
    "reasons": (np.str_, ()),
}


@dataclass(frozen=True, eq=False)
class RowTable:
    """What is known of the S rows of a shard beside their entries.

    Attributes:
        status: uint8 [S], `LABELLED` or `FAILED`.
        sizes: int32 [S, 2], (width, height) in pixels of the upright image.
        orientations: uint8 [S], EXIF orientation of the file (1: stored upright).
        boxes: float64 [S, 4], view box (x0, y0, x1, y1) in the image frame.
        pooled_ids: int32 [S, K], the annotator's own top classes for the whole image.
        pooled_probabilities: float32 [S, K], theirs.
        kl_quantization: float32 [S], nats, mean over cells: from the annotator's top-k with the
            rest spread evenly to what the entries decode to.
        kl_full: float32 [S], nats, mean over cells: from the annotator's full distribution to
            what the entries decode to.
        reasons: str [S], why a row failed; "" where it did not.
    """

    status: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    pooled_ids: NDArray[np.int32]
    pooled_probabilities: NDArray[np.float32]
    kl_quantization: NDArray[np.float32]
    kl_full: NDArray[np.float32]
    reasons: NDArray[np.str_]

    @classmethod
    def empty(cls, rows: int, top_k: int) -> Self:
        """A table of zeros to fill in; reasons have room for 300 characters."""
        sizes = {"2": 2, "4": 4, "K": top_k}
        dtypes: dict[str, Any] = {"reasons": "<U300"}
        return cls(
            **{
                name: np.zeros((rows, *(sizes[d] for d in dims)), dtypes.get(name, dtype))
                for name, (dtype, dims) in _COLUMNS.items()
            }
        )

    def to_bytes(self) -> bytes:
        """The table as a compressed numpy `.npz` file; equal tables give equal bytes."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        # As narrow as the longest reason: most shards have none.
        columns["reasons"] = np.array(columns["reasons"].tolist(), dtype=np.str_)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, rows: int, top_k: int, where: str) -> Self:
        """Read what `to_bytes` wrote; `where` names the file in errors.

        Raises:
            CorruptStoreError: the bytes are no such table.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as columns:
                table = cls(**{name: columns[name] for name in _COLUMNS})
        except Exception as error:
            raise CorruptStoreError(f"{where}: damaged row table: {error}") from error
        sizes = {"2": 2, "4": 4, "K": top_k}
        for name, (dtype, dims) in _COLUMNS.items():
            column, shape = getattr(table, name), (rows, *(sizes[d] for d in dims))
            if column.shape != shape or not np.issubdtype(column.dtype, dtype):
                raise CorruptStoreError(
                    f"{where}: column {name!r}: expected {dtype.__name__} {shape}, "
                    f"got {column.dtype} {column.shape}"
                )
        return table


@dataclass(frozen=True)
class ShardRecord:
    """The content of a commit record.

    Attributes:
        shard: number of the shard.
        start: first row.
        stop: one past its last row.
        entries: the shard object of the Zarr array.
        rows: the row table.
        failures: row number (as text, for JSON) -> reason, for images that have no label.
        kl_quantization: mean over the labelled rows, nats; see `RowTable`.
        kl_full: likewise.
    """

    shard: int
    start: int
    stop: int
    entries: ObjectRef
    rows: ObjectRef
    failures: dict[str, str]
    kl_quantization: float
    kl_full: float

    @classmethod
    def of(
        cls, shard: int, start: int, entries: ObjectRef, rows: ObjectRef, table: RowTable
    ) -> Self:
        """Build the record of published objects."""
        labelled = table.status == LABELLED
        count = max(int(labelled.sum()), 1)
        # fsum, so that the figure is the same on every machine
        kl_quantization = math.fsum(table.kl_quantization[labelled].tolist()) / count
        kl_full = math.fsum(table.kl_full[labelled].tolist()) / count
        failures = {str(start + i): str(table.reasons[i]) for i in np.flatnonzero(~labelled)}
        stop = start + len(table.status)
        return cls(shard, start, stop, entries, rows, failures, kl_quantization, kl_full)

    def to_bytes(self) -> bytes:
        """The record as sealed JSON."""
        return seal(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a record; `where` names the file in errors.

        Raises:
            CorruptStoreError: the bytes are no record.
        """
        try:
            found = unseal(data)
            found["entries"] = ObjectRef(**found["entries"])
            found["rows"] = ObjectRef(**found["rows"])
            return cls(**found)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{where}: damaged commit record: {error}") from error
