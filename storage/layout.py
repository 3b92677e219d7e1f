"""Where things lie in a store, and how each of them is read.

manifest.json            what the store is and how it was made
plan.<hash>.npz          rows -> keys
maps.zarr/               Zarr v3 array `entries` [N, K, H, W]; one object a shard
shards/000042.rows.npz   columns of a shard's rows
shards/000042.json       commit record: the shard is visible once this is there
"""

import re

from .errors import CorruptStoreError, StoreFormatError
from .folder import StoreFolder
from .manifest import MANIFEST, Manifest, Settings
from .objects import ObjectRef
from .plan import Plan
from .records import RowTable, ShardRecord

__all__ = [
    "MAPS",
    "committed_shards",
    "plan_object",
    "read_manifest",
    "read_object",
    "read_plan",
    "read_record",
    "record_object",
    "row_table",
    "rows_object",
    "shard_object",
]

MAPS = "maps.zarr"
_SHARDS = "shards"
_RECORD = re.compile(rf"{_SHARDS}/([0-9]{{6,}})\.json")


def plan_object(settings: Settings) -> str:
    """Name of the plan; it carries the hash, so that an abandoned plan is in nobody's way."""
    return f"plan.{settings.plan_sha256[:16]}.npz"


def shard_object(shard: int) -> str:
    """Name of the object that holds a shard's entries."""
    return f"{MAPS}/entries/c.{shard}.0.0.0"


def rows_object(shard: int) -> str:
    """Name of a shard's row table."""
    return f"{_SHARDS}/{shard:06d}.rows.npz"


def record_object(shard: int) -> str:
    """Name of a shard's commit record."""
    return f"{_SHARDS}/{shard:06d}.json"


def committed_shards(folder: StoreFolder) -> list[int]:
    """Numbers of the shards that have a record, ascending."""
    matches = (_RECORD.fullmatch(name) for name in folder.names(_SHARDS))
    numbers = ((int(match[1]), match[0]) for match in matches if match)
    # `0000001.json` is no second record of shard 1
    return sorted(shard for shard, name in numbers if name == record_object(shard))


def read_manifest(folder: StoreFolder) -> Manifest:
    """The manifest of a store.

    Raises:
        StoreFormatError: the folder holds no store, or one this program does not read.
    """
    if not folder.exists(MANIFEST):
        raise StoreFormatError(
            f"{folder}: no label store here ({MANIFEST} is missing); "
            "make one with: tokenlabel annotate SOURCE OUT --model NAME"
        )
    return Manifest.from_bytes(folder.read(MANIFEST), str(folder.path(MANIFEST)))


def read_plan(folder: StoreFolder, settings: Settings) -> Plan:
    """The plan of a store, held against its manifest.

    Raises:
        StoreFormatError: it is not the plan that the manifest names.
        CorruptStoreError: it is missing.
    """
    name = plan_object(settings)
    plan = Plan.from_bytes(folder.read(name), str(folder.path(name)))
    if plan.digest() != settings.plan_sha256 or len(plan) != settings.rows:
        raise StoreFormatError(f"{folder.path(name)}: not the plan that the manifest names")
    return plan


def read_record(folder: StoreFolder, settings: Settings, shard: int) -> ShardRecord:
    """The commit record of a shard.

    Raises:
        CorruptStoreError: it is missing, damaged, or the record of another shard.
    """
    name = record_object(shard)
    record = ShardRecord.from_bytes(folder.read(name), str(folder.path(name)))
    rows = settings.shard_rows(shard)
    if (record.shard, record.start, record.stop) != (shard, rows.start, rows.stop):
        raise CorruptStoreError(
            f"{folder.path(name)}: expected the record of shard {shard}, rows {rows.start} to "
            f"{rows.stop}; it is that of shard {record.shard}, rows {record.start} to {record.stop}"
        )
    return record


def read_object(folder: StoreFolder, ref: ObjectRef) -> bytes:
    """The bytes of an object, held against what was committed.

    Raises:
        CorruptStoreError: it is missing or changed.
    """
    data = folder.read(ref.name)
    if len(data) != ref.size:
        raise CorruptStoreError(
            f"{folder.path(ref.name)}: {len(data)} bytes, {ref.size} were committed"
        )
    if ObjectRef.of(ref.name, data) != ref:
        raise CorruptStoreError(
            f"{folder.path(ref.name)}: the SHA-256 is not the one that was committed"
        )
    return data


def row_table(folder: StoreFolder, settings: Settings, shard: int, data: bytes) -> RowTable:
    """The row table of a shard, from its bytes.

    Raises:
        CorruptStoreError: they are damaged.
    """
    where = str(folder.path(rows_object(shard)))
    return RowTable.from_bytes(data, len(settings.shard_rows(shard)), settings.top_k, where)
