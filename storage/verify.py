"""Checking a store byte by byte against its own records, and its keys against a source."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .encoding import unpack_entries
from .errors import CorruptStoreError, InvalidLabelError, TokenLabelError
from .folder import StoreFolder
from .label_map import GridView
from .layout import (
    MAPS,
    committed_shards,
    read_manifest,
    read_object,
    read_plan,
    read_record,
    record_object,
    row_table,
    rows_object,
    shard_object,
)
from .manifest import Settings
from .maps import ShardFile, maps_metadata
from .objects import ObjectRef
from .records import FAILED, LABELLED, RowTable, ShardRecord

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str],
    source_keys: Iterable[str] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[str]:
    """Check everything a store holds; yields one line for each fault, none for a sound store.

    Checked are the manifest, the plan, Zarr's metadata, that every shard is committed, the hash
    and size of every object, that each record says what its objects say, and that every class
    id, rank order, empty entry and view is as the format has it.

    Args:
        path: the store's folder.
        source_keys: keys of the source to hold the store's keys against.
        progress: called with (shards checked, shards in all).
    """
    folder = StoreFolder(Path(path))
    try:
        manifest = read_manifest(folder)
        settings = manifest.settings
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
    for ref in manifest.objects:
        yield from _object_faults(folder, ref)
    committed = set(committed_shards(folder))
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


def _strangers(folder: StoreFolder, settings: Settings, committed: set[int]) -> Iterator[str]:
    expected = {name(s) for s in committed for name in (record_object, rows_object)}
    planned = range(settings.num_shards)
    # objects without a record yet: their writer died, or is still at work
    unfinished = {name(s) for s in planned for name in (shard_object, rows_object)}
    found = {*folder.names("shards"), *folder.names(f"{MAPS}/entries")}
    for name in sorted(found - expected - unfinished - set(maps_metadata(settings))):
        yield f"{folder.path(name)}: not part of the store"
    for shard in sorted(committed):
        if shard >= settings.num_shards:
            yield (
                f"{folder.path(record_object(shard))}: the manifest has only "
                f"{settings.num_shards} shards"
            )


def _object_faults(folder: StoreFolder, ref: ObjectRef) -> Iterator[str]:
    try:
        read_object(folder, ref)
    except TokenLabelError as error:
        yield str(error)


def _shard_faults(folder: StoreFolder, settings: Settings, shard: int) -> Iterator[str]:
    try:
        record = read_record(folder, settings, shard)
        where = folder.path(record_object(shard))
        named = (record.entries.name, record.rows.name)
        if named != (shard_object(shard), rows_object(shard)):
            raise CorruptStoreError(f"{where}: names {named}, which are not the shard's objects")
        changed = [
            *_object_faults(folder, record.entries),
            *_object_faults(folder, record.rows),
        ]
        if changed:
            yield from changed
            return
        table = row_table(folder, settings, shard, folder.read(rows_object(shard)))
        file = ShardFile(folder.path(shard_object(shard)), settings, shard)
        entries = np.stack([file.entries(row) for row in settings.shard_rows(shard)])
    except CorruptStoreError as error:
        yield str(error)
        return
    if record != ShardRecord.of(shard, record.start, record.entries, record.rows, table):
        yield f"{where}: the record does not fit its row table"
    yield from _value_faults(folder, settings, shard, entries, table)


def _value_faults(
    folder: StoreFolder,
    settings: Settings,
    shard: int,
    entries: NDArray[np.uint32],
    table: RowTable,
) -> Iterator[str]:
    class_ids, steps = unpack_entries(entries)  # [S, K, H, W]
    labelled = table.status == LABELLED
    over_cells = (1, 2, 3)
    in_entries = {
        "a class id is out of range": (class_ids >= settings.num_classes).any(axis=over_cells),
        "scores are not in rank order": (steps[:, 1:] > steps[:, :-1]).any(axis=over_cells),
        "an empty entry has a class id": ((steps == 0) & (class_ids != 0)).any(axis=over_cells),
        "labelled, but a cell has no class": labelled & (steps[:, 0] == 0).any(axis=(1, 2)),
        "failed, but holds scores": ~labelled & steps.any(axis=over_cells),
    }
    pooled = table.pooled_ids
    in_table = {
        "unknown status": table.status > FAILED,
        "a pooled class id is out of range": labelled
        & ((pooled < 0) | (pooled >= settings.num_classes)).any(axis=1),
        "labelled, but its view is no box on the image": labelled
        & ~np.array([_is_view(box) for box in table.boxes.tolist()]),
    }
    start = settings.shard_rows(shard).start
    for name, faults in ((shard_object(shard), in_entries), (rows_object(shard), in_table)):
        for fault, rows in faults.items():
            for row in np.flatnonzero(rows):
                yield f"{folder.path(name)}: row {start + row}: {fault}"


def _is_view(box: list[float]) -> bool:
    x0, y0, x1, y1 = box
    try:
        GridView((x0, y0, x1, y1))
    except InvalidLabelError:
        return False
    return True
