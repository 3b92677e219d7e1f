"""Writing a store: lay out an empty one, or continue one, and commit shards to it.

Any number of writers may commit to one store at once. What a shard's record says is decided by
the first object that was published, never by who comes last.
"""

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptStoreError, SettingsError
from .folder import StoreFolder
from .layout import (
    MAPS,
    committed_shards,
    plan_object,
    read_manifest,
    read_plan,
    read_rows,
    record_object,
    rows_object,
    shard_object,
)
from .manifest import MANIFEST, Manifest, Settings, differences
from .maps import ShardFile, encode_shard, maps_metadata
from .plan import Plan
from .records import LABELLED, ObjectRef, RowTable, ShardRecord

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
        settings = manifest.settings
        if not folder.exists(MANIFEST):
            if folder.root.is_dir():
                strangers = sorted(
                    entry.name
                    for entry in folder.root.iterdir()
                    if not entry.name.startswith(("plan.", ".tmp")) and entry.name != MAPS
                )
                if strangers:
                    raise SettingsError(
                        f"{folder}: the folder holds other files ({strangers[0]!r}); "
                        "choose a new or an empty folder"
                    )
            folder.publish(plan_object(settings), plan.to_bytes())
            for name, data in maps_metadata(settings).items():
                folder.publish(name, data)
            folder.publish(MANIFEST, manifest.to_bytes())
        stored = read_manifest(folder).settings
        if stored.plan_sha256 != settings.plan_sha256:
            raise SettingsError(
                f"{folder}: the source is not the one the store was begun with: "
                f"{read_plan(folder, stored).changes(plan)}. "
                "Bring the source back as it was, or write to another folder"
            )
        if stored.fingerprint() != settings.fingerprint():
            changed = "; ".join(differences(asdict(stored), asdict(settings)))
            raise SettingsError(
                f"{folder}: the store was made with other settings ({changed}). "
                "Run with its settings to continue it, or write to another folder"
            )
        folder.clean()
        return cls(folder, settings)

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
        """
        rows = self.settings.shard_rows(shard)
        data = encode_shard(self.settings, shard, entries)
        if not self.folder.publish(shard_object(shard), data):
            data, entries = self._published_entries(shard, data, entries)
        columns = table.to_bytes()
        if not self.folder.publish(rows_object(shard), columns):
            columns = self.folder.read(rows_object(shard))
            table = read_rows(self.folder, self.settings, shard)
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
