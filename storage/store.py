"""Reading a store: by key, by index, or many indices at once.

Opening reads the manifest, the plan and the commit records; maps are read when asked for. A
store object can be pickled and used after fork or spawn: files are opened lazily and read by
position.
"""

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import IncompleteStoreError, MissingLabelError
from .folder import StoreFolder
from .label_map import LabelBatch, LabelMap
from .layout import (
    committed_shards,
    read_manifest,
    read_object,
    read_plan,
    read_record,
    row_table,
    shard_object,
)
from .maps import ShardFile
from .plan import NO_TARGET
from .records import RowTable

__all__ = ["LabelStore", "SampleInfo", "StoreStatistics", "open_store"]

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class SampleInfo:
    """What a store knows of a sample beside its map.

    Attributes:
        key: the sample's key.
        size: (width, height) in pixels of the upright image.
        orientation: EXIF orientation of the file (1: stored upright).
        target: the class the source gave it, a name, or None.
        pooled: the annotator's own top classes for the whole image, (class id, probability).
        kl_quantization: nats lost to rounding; see `tokenlabel.storage.records.RowTable`.
        kl_full: nats between the annotator's full distribution and the stored one.
    """

    key: str
    size: tuple[int, int]
    orientation: int
    target: str | None
    pooled: list[tuple[int, float]]
    kl_quantization: float
    kl_full: float


@dataclass(frozen=True)
class StoreStatistics:
    """Figures over all labelled samples of a store.

    Attributes:
        entry_bytes: size of all entries, compressed.
        kl_quantization: nats a cell lost to rounding.
        kl_full: nats a cell between the annotator's full distribution and the stored one.
    """

    entry_bytes: int
    kl_quantization: float
    kl_full: float


def open_store(path: str | os.PathLike[str], *, allow_partial: bool = False) -> "LabelStore":
    """Open a label store.

    Args:
        path: the folder that `tokenlabel annotate` wrote.
        allow_partial: open a store although some shards are not committed yet. Their rows have
            no index and asking for their keys is an error.

    Raises:
        StoreFormatError: no store, or a version this program does not read.
        IncompleteStoreError: shards are missing and `allow_partial` was not asked for.
        CorruptStoreError: its plan or a commit record is damaged.
    """
    return LabelStore(path, allow_partial=allow_partial)


class LabelStore:
    """The labels of a data set. Made by `open_store`.

    Indices count the labelled samples, in the order of the plan: failed images and shards that
    are not committed are skipped by `len`, `keys` and indices alike.

    Attributes:
        manifest: what the store is and how it was made.
        failures: key -> reason, for images that could not be annotated.
        statistics: size and fidelity.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_partial: bool = False) -> None:
        self._folder = StoreFolder(Path(path))
        self._allow_partial = allow_partial
        self.manifest = read_manifest(self._folder)
        settings = self.manifest.settings
        self._plan = read_plan(self._folder, settings)
        committed = [s for s in committed_shards(self._folder) if s < settings.num_shards]
        if len(committed) < settings.num_shards and not allow_partial:
            raise IncompleteStoreError(
                f"{path}: {len(committed)} of {settings.num_shards} shards are committed. Run the "
                "same annotate command again to finish it, or open it with allow_partial=True"
            )
        labelled = np.zeros(settings.rows, dtype=bool)
        self.failures: dict[str, str] = {}
        self._records = {s: read_record(self._folder, settings, s) for s in committed}
        records = self._records.values()
        for record in records:
            labelled[record.start : record.stop] = True
            for row, reason in record.failures.items():
                labelled[int(row)] = False
                self.failures[self._plan.key(int(row))] = reason
        counts = [record.stop - record.start - len(record.failures) for record in records]
        total = max(sum(counts), 1)
        self.statistics = StoreStatistics(
            sum(record.entries.size for record in records),
            sum(n * r.kl_quantization for n, r in zip(counts, records, strict=True)) / total,
            sum(n * r.kl_full for n, r in zip(counts, records, strict=True)) / total,
        )
        self._rows: NDArray[np.int64] = np.flatnonzero(labelled)
        self._shard_file = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._row_table = lru_cache(_OPEN_SHARDS)(self._read_rows)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._folder.root, self._allow_partial)

    def __repr__(self) -> str:
        return f"<LabelStore {self._folder} with {len(self)} maps>"

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        row = self._plan.row(key) if isinstance(key, str) else None
        return row is not None and self._index_of_row(row) is not None

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._folder.root

    @property
    def committed_shards(self) -> int:
        """How many of the manifest's `settings.num_shards` shards are there."""
        return len(self._records)

    def keys(self) -> Iterator[str]:
        """Keys of the labelled samples, in index order."""
        return (self._plan.key(int(row)) for row in self._rows)

    def key(self, index: int) -> str:
        """The key of an index."""
        return self._plan.key(self._row(index))

    def index(self, key: str) -> int:
        """The index of a key.

        Raises:
            MissingLabelError: unknown key, or its image could not be annotated.
            IncompleteStoreError: its shard is not committed yet.
        """
        row = self._plan.row(key)
        if row is None:
            raise MissingLabelError(
                f"{self._folder}: no sample has the key {key!r}; keys are paths below the source, "
                f"such as {self._plan.key(0)!r}"
            )
        index = self._index_of_row(row)
        if index is not None:
            return index
        if key in self.failures:
            raise MissingLabelError(
                f"{self._folder}: {key!r} has no label, its image failed: {self.failures[key]}"
            )
        shard = row // self.manifest.settings.shard_size
        raise IncompleteStoreError(
            f"{self._folder}: {key!r} is in shard {shard}, which is not committed yet; run the "
            "same annotate command again to finish it"
        )

    def __getitem__(self, key: str | int) -> LabelMap:
        """The label map of a key or an index."""
        index = self.index(key) if isinstance(key, str) else key
        return self.read([index])[0]

    def __iter__(self) -> Iterator[LabelMap]:
        return (self[index] for index in range(len(self)))

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> LabelBatch:
        """The maps of several indices, in the order asked for.

        Raises:
            MissingLabelError: an index out of range.
            CorruptStoreError: stored bytes are not what was committed.
        """
        settings = self.manifest.settings
        rows = [self._row(operator.index(index)) for index in indices]
        entries = np.empty((len(rows), settings.top_k, *settings.grid), dtype=np.uint32)
        boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(rows), 1))
        for place, row in enumerate(rows):
            shard, offset = divmod(row, settings.shard_size)
            entries[place] = self._shard_file(shard).entries(row)
            if settings.view != "stretch":
                boxes[place] = self._row_table(shard).boxes[offset]
        return LabelBatch(entries, settings.step, settings.num_classes, boxes)

    def info(self, key: str | int) -> SampleInfo:
        """What is known of a sample beside its map."""
        settings = self.manifest.settings
        row = self._row(self.index(key) if isinstance(key, str) else key)
        shard, offset = divmod(row, settings.shard_size)
        table = self._row_table(shard)
        target = int(self._plan.targets[row])
        pooled = zip(
            table.pooled_ids[offset].tolist(),
            table.pooled_probabilities[offset].tolist(),
            strict=True,
        )
        width, height = table.sizes[offset].tolist()
        return SampleInfo(
            key=self._plan.key(row),
            size=(width, height),
            orientation=int(table.orientations[offset]),
            target=None if target == NO_TARGET else self.manifest.source["classes"][target],
            pooled=list(pooled),
            kl_quantization=float(table.kl_quantization[offset]),
            kl_full=float(table.kl_full[offset]),
        )

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise MissingLabelError(
                f"{self._folder}: index {index} is out of range, the store has {len(self)} maps"
            )
        return int(self._rows[index])

    def _index_of_row(self, row: int) -> int | None:
        index = int(np.searchsorted(self._rows, row))
        return index if index < len(self) and self._rows[index] == row else None

    def _open_shard(self, shard: int) -> ShardFile:
        path, size = self._folder.path(shard_object(shard)), self._records[shard].entries.size
        return ShardFile(path, self.manifest.settings, shard, size)

    def _read_rows(self, shard: int) -> RowTable:
        data = read_object(self._folder, self._records[shard].rows)
        return row_table(self._folder, self.manifest.settings, shard, data)


def _reopen(path: Path, allow_partial: bool) -> LabelStore:
    return LabelStore(path, allow_partial=allow_partial)
