"""Writing a store: lay out an empty one, or continue one, and commit shards to it.

Any number of writers may commit to one store at once. What a shard's record says is decided by
the first object that was published, never by who comes last.
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptStoreError, InvalidLabelError, SettingsError
from .folder import StoreFolder
from .layout import (
    committed_shards,
    plan_object,
    read_manifest,
    read_plan,
    record_object,
    row_table,
    rows_object,
    shard_object,
)
from .manifest import MANIFEST, Manifest, Settings, differences
from .maps import ShardFile, encode_shard, maps_metadata
from .objects import ObjectRef, canonical_json
from .plan import Plan
from .records import LABELLED, RowTable, ShardRecord

__all__ = ["StoreWriter"]


@dataclass(frozen=True)
class StoreWriter:
    """A store that is being written.

    Attributes:
        folder: where.
        settings: what its values depend on.
    """

    folder: StoreFolder
    settings: Settings

    @classmethod
    def open(cls, folder: StoreFolder, manifest: Manifest, plan: Plan) -> Self:
        """Lay out a new store, or continue the one that is there.

        Raises:
            SettingsError: the store there was made with other settings; each is named.
            PublishError: the folder cannot be written.
        """
        cls.check(folder, manifest, plan)
        if not folder.exists(MANIFEST):
            _begin(folder, manifest, plan)
            cls.check(folder, manifest, plan)  # another run's manifest may have won
        _lay_out(folder, read_manifest(folder))
        folder.clean()
        return cls(folder, manifest.settings)

    @staticmethod
    def check(folder: StoreFolder, manifest: Manifest, plan: Plan) -> None:
        """See that a folder is free for a store, or holds one of the same settings; only reads.

        Raises:
            SettingsError: it holds other files, or a store made with other settings; each is
                named.
        """
        settings = manifest.settings
        if not folder.exists(MANIFEST):
            strangers = sorted(
                entry.name
                for entry in (folder.root.iterdir() if folder.root.is_dir() else ())
                if not entry.name.startswith(("plan.", ".tmp"))
            )
            if strangers:
                raise SettingsError(
                    f"{folder}: the folder holds other files ({strangers[0]!r}); "
                    "choose a new or an empty folder"
                )
            return
        stored = read_manifest(folder).settings
        if stored.plan_sha256 != settings.plan_sha256:
            raise SettingsError(
                f"{folder}: the source is not the one the store was begun with: "
                f"{read_plan(folder, stored).changes(plan)}. "
                "Bring the source back as it was, or write to another folder"
            )
        if stored.fingerprint() != settings.fingerprint():
            asked = json.loads(canonical_json(asdict(settings)))  # as it would be stored
            changed = "; ".join(differences(asdict(stored), asked))
            raise SettingsError(
                f"{folder}: the store was made with other settings ({changed}). "
                "Run with its settings to continue it, or write to another folder"
            )

    def pending(self) -> list[int]:
        """Numbers of the shards that are not committed yet, ascending."""
        done = set(committed_shards(self.folder))
        return [shard for shard in range(self.settings.num_shards) if shard not in done]

    def commit(self, shard: int, entries: NDArray[np.uint32], table: RowTable) -> ShardRecord:
        """Publish a shard: entries, row table, record, in this order.

        Where another writer was first, its objects count, after they have been checked.

        Args:
            shard: its number.
            entries: uint32 [rows of the shard, K, H, W]; all 0 for failed rows.
            table: the columns of the same rows.

        Raises:
            PublishError: the store cannot be written.
            CorruptStoreError: an earlier writer's objects are damaged or contradict each other.
            InvalidLabelError: the entries or the table have not the shard's shape.
        """
        rows = self.settings.shard_rows(shard)
        shape = (len(rows), self.settings.top_k, *self.settings.grid)
        if entries.shape != shape or entries.dtype != np.uint32 or len(table.status) != len(rows):
            raise InvalidLabelError(
                f"shard {shard} takes uint32 entries of shape {shape} and a table of {len(rows)} "
                f"rows, got {entries.dtype} {entries.shape} and {len(table.status)} rows"
            )
        data = encode_shard(self.settings, shard, entries)
        if not self.folder.publish(shard_object(shard), data):
            data, entries = self._published_entries(shard, data, entries)
        columns = table.to_bytes()
        if not self.folder.publish(rows_object(shard), columns):
            columns = self.folder.read(rows_object(shard))
            table = row_table(self.folder, self.settings, shard, columns)
        self._check_agreement(shard, entries, table)
        record = ShardRecord.of(
            shard,
            rows.start,
            ObjectRef.of(shard_object(shard), data),
            ObjectRef.of(rows_object(shard), columns),
            table,
        )
        self.folder.publish(record_object(shard), record.to_bytes())
        return record

    def _published_entries(
        self, shard: int, ours: bytes, entries: NDArray[np.uint32]
    ) -> tuple[bytes, NDArray[np.uint32]]:
        name = shard_object(shard)
        theirs = self.folder.read(name)
        if theirs == ours:
            return ours, entries
        file = ShardFile(self.folder.path(name), self.settings, shard)
        return theirs, np.stack([file.entries(row) for row in self.settings.shard_rows(shard)])

    def _check_agreement(self, shard: int, entries: NDArray[np.uint32], table: RowTable) -> None:
        has_label = entries[:, 0].reshape(len(entries), -1).all(axis=1)
        if not np.array_equal(has_label, table.status == LABELLED):
            raise CorruptStoreError(
                f"{self.folder.path(shard_object(shard))}: an unfinished attempt labelled other "
                f"rows than {self.folder.path(rows_object(shard)).name} says; neither is "
                "committed: delete both and run the same command again"
            )


def _begin(folder: StoreFolder, manifest: Manifest, plan: Plan) -> None:
    """Publish plan and manifest of a new store; where several begin one, one manifest wins."""
    settings = manifest.settings
    name, data = plan_object(settings), plan.to_bytes()
    if not folder.publish(name, data):
        data = folder.read(name)
    objects = {name: data, **maps_metadata(settings)}
    refs = tuple(ObjectRef.of(name, data) for name, data in objects.items())
    folder.publish(MANIFEST, replace(manifest, objects=refs).to_bytes())


def _lay_out(folder: StoreFolder, manifest: Manifest) -> None:
    """Publish Zarr's metadata, unless it is there.

    Only once a manifest has settled the shapes: the metadata of another run, begun at the same
    time or stopped before its manifest, would stay for good.
    """
    metadata = maps_metadata(manifest.settings)
    for ref in manifest.objects:
        if ref.name in metadata and not folder.exists(ref.name):
            if ObjectRef.of(ref.name, metadata[ref.name]) != ref:
                raise SettingsError(
                    f"{folder.path(ref.name)}: missing, and this release of zarr would write "
                    "another one; continue with the release that the manifest names"
                )
            folder.publish(ref.name, metadata[ref.name])
