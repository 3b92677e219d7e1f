"""Checking a store byte by byte against its own records, and its keys against a source."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .encoding import unpack_entries
from .errors import CorruptStoreError, TokenLabelError
from .folder import StoreFolder
from .layout import (
    MAPS,
    committed_shards,
    read_manifest,
    read_plan,
    read_record,
    read_rows,
    record_object,
    rows_object,
    shard_object,
)
from .manifest import Settings
from .maps import ShardFile, maps_metadata
from .records import LABELLED, ObjectRef, RowTable, ShardRecord

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str],
    source_keys: Iterable[str] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[str]:
    """Check everything a store holds; yields one line for each fault, none for a sound store.

    Checked are the manifest, the plan, Zarr's metadata, that every shard is committed, the hash
    and size of every object, that each record says what its objects say, and that every class
    id, rank order and empty entry is as the format has it.

    Args:
        path: the store's folder.
        source_keys: keys of the source to hold the store's keys against.
        progress: called with (shards checked, shards in all).
    """
    folder = StoreFolder(Path(path))
    try:
        settings = read_manifest(folder).settings
        plan = read_plan(folder, settings)
    except TokenLabelError as error:
        yield str(error)  # without these nothing else can be judged
        return
    if source_keys is not None:
        found = set(source_keys)
        for key in plan.keys():  # noqa: SIM118 - a plan is no mapping
            if key not in found:
                yield f"{key}: in the store, not in the source"
            found.discard(key)
        for key in sorted(found):
            yield f"{key}: in the source, not in the store"
    for name in maps_metadata(settings):
        if not folder.exists(name):
            yield f"{folder.path(name)}: missing; other Zarr readers cannot open the store"
    committed = committed_shards(folder)
    yield from _strangers(folder, settings, committed)
    for done, shard in enumerate(range(settings.num_shards), start=1):
        if shard in committed:
            yield from _shard_faults(folder, settings, shard)
        else:
            yield (
                f"{folder.path(record_object(shard))}: shard {shard} is not committed; run the "
                "same annotate command again to finish the store"
            )
        progress(done, settings.num_shards)


def _strangers(folder: StoreFolder, settings: Settings, committed: list[int]) -> Iterator[str]:
    expected = {name(s) for s in committed for name in (record_object, rows_object)}
    planned = range(settings.num_shards)
    # objects without a record yet: their writer died, or is still at work
    unfinished = {name(s) for s in planned for name in (shard_object, rows_object)}
    found = {*folder.names("shards"), *folder.names(f"{MAPS}/entries")}
    for name in sorted(found - expected - unfinished - set(maps_metadata(settings))):
        yield f"{folder.path(name)}: not part of the store"
    for shard in committed:
        if shard >= settings.num_shards:
            yield (
                f"{folder.path(record_object(shard))}: the manifest has only "
                f"{settings.num_shards} shards"
            )


def _shard_faults(folder: StoreFolder, settings: Settings, shard: int) -> Iterator[str]:
    try:
        record = read_record(folder, shard)
        for expected, ref in (
            (shard_object(shard), record.entries),
            (rows_object(shard), record.rows),
        ):
            _check_object(folder, expected, ref)
        table = read_rows(folder, settings, shard)
        file = ShardFile(folder.path(shard_object(shard)), settings, shard)
        entries = np.stack([file.entries(row) for row in settings.shard_rows(shard)])
    except CorruptStoreError as error:
        yield str(error)
        return
    start = settings.shard_rows(shard).start
    if record != ShardRecord.of(shard, start, record.entries, record.rows, table):
        yield f"{folder.path(record_object(shard))}: the record does not fit its row table"
    where = str(folder.path(shard_object(shard)))
    yield from _value_faults(settings, where, start, entries, table)


def _check_object(folder: StoreFolder, expected: str, ref: ObjectRef) -> None:
    path = folder.path(expected)
    if ref.name != expected:
        raise CorruptStoreError(f"{path}: the record names {ref.name!r} instead")
    data = folder.read(expected)
    if len(data) != ref.size:
        raise CorruptStoreError(f"{path}: {len(data)} bytes, {ref.size} were committed")
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise CorruptStoreError(f"{path}: the SHA-256 is not the one that was committed")


def _value_faults(
    settings: Settings, where: str, start: int, entries: NDArray[np.uint32], table: RowTable
) -> Iterator[str]:
    class_ids, steps = unpack_entries(entries)  # [S, K, H, W]
    over_cells = (1, 2, 3)
    faults = {
        "a class id is out of range": (class_ids >= settings.num_classes).any(axis=over_cells),
        "scores are not in rank order": (steps[:, 1:] > steps[:, :-1]).any(axis=over_cells),
        "an empty entry has a class id": ((steps == 0) & (class_ids != 0)).any(axis=over_cells),
        "labelled, but a cell has no class": (table.status == LABELLED)
        & (steps[:, 0] == 0).any(axis=(1, 2)),
        "failed, but holds scores": (table.status != LABELLED) & steps.any(axis=over_cells),
    }
    for fault, rows in faults.items():
        for row in np.flatnonzero(rows):
            yield f"{where}: row {start + row}: {fault}"
