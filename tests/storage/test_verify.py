"""Every kind of damage gives a line that names the file; none gives an exception or bad data."""

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from tokenlabel.storage import open_store, verify
from tokenlabel.storage.errors import CorruptStoreError, IncompleteStoreError
from tokenlabel.storage.manifest import Settings
from tokenlabel.storage.maps import ShardFile, encode_shard
from tokenlabel.storage.objects import seal, unseal

SHARD = "maps.zarr/entries/c.1.0.0.0"
ROWS = "shards/000001.rows.npz"
RECORD = "shards/000001.json"
OBJECTS = (SHARD, ROWS, RECORD, "manifest.json", "plan", "maps.zarr/entries/zarr.json")


def locate(path: Path, name: str) -> Path:
    return next(path.glob("plan.*.npz")) if name == "plan" else path / name


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_a_sound_store_gives_no_fault(store_path: Path, kit: Any) -> None:
    before = kit.tree(store_path)
    calls: list[tuple[int, int]] = []
    assert list(verify(store_path, progress=lambda *call: calls.append(call))) == []
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert kit.tree(store_path) == before, "verify changes nothing"


def test_what_a_writer_at_work_has_not_committed_is_no_stranger(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s")
    (tmp_path / "s" / RECORD).unlink()
    (fault,) = verify(tmp_path / "s")
    assert "shard 1 is not committed" in fault


# One bit in any object


@pytest.mark.parametrize("name", OBJECTS)
def test_any_flipped_bit_is_found(store_path: Path, name: str) -> None:
    path = locate(store_path, name)
    original = path.read_bytes()
    rng = random.Random(name)  # noqa: S311 - seeded damage
    bits = [0, 8 * len(original) - 1, *(rng.randrange(8 * len(original)) for _ in range(25))]
    for bit in bits:
        flip(path, bit)
        faults = list(verify(store_path))
        assert faults, f"bit {bit} of {name}"
        assert any(path.name in fault for fault in faults)
        path.write_bytes(original)
    assert list(verify(store_path)) == []


def test_every_bit_of_a_record_is_held(store_path: Path) -> None:
    path = store_path / RECORD
    original = path.read_bytes()
    for bit in range(0, 8 * len(original), 7):
        flip(path, bit)
        with pytest.raises(CorruptStoreError, match=r"000001\.json"):
            open_store(store_path)
        path.write_bytes(original)


# Whole objects


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def delete(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, empty, lengthen, delete, replace_by_folder])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_damaged_object_is_named(
    store_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = locate(store_path, name)
    damage(path)
    faults = list(verify(store_path))
    assert any(path.name in fault for fault in faults), faults
    assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("maps.zarr/entries/c.0.0.0.0", SHARD),
        ("shards/000000.rows.npz", ROWS),
        ("shards/000000.json", RECORD),
    ],
)
def test_swapped_objects_are_named_and_never_read(store_path: Path, one: str, other: str) -> None:
    swap(store_path / one, store_path / other)
    faults = list(verify(store_path))
    for name in (one, other):
        assert any(Path(name).name in fault for fault in faults), faults

    def read_all() -> None:
        store = open_store(store_path)
        for key in store.keys():  # noqa: SIM118 - iterating a store gives maps
            store.info(key)
            store[key]

    with pytest.raises(CorruptStoreError):
        read_all()


@pytest.mark.parametrize(
    "name",
    [
        "shards/notes.txt",
        "shards/000001.json.bak",
        "shards/0000001.json",
        "shards/000001.r1.json",
        "maps.zarr/entries/c.3.0.0.0",
        "maps.zarr/entries/c.1.0.0.0~",
    ],
)
def test_files_that_do_not_belong_are_named(store_path: Path, name: str) -> None:
    (store_path / name).write_bytes(b"stray")
    (fault,) = verify(store_path)
    assert fault.startswith(f"{store_path / name}: not part")
    assert len(open_store(store_path)) == 9, "they do no harm"


def test_a_record_under_another_spelling_of_its_number_commits_nothing(store_path: Path) -> None:
    (store_path / RECORD).rename(store_path / "shards/0000001.json")
    with pytest.raises(IncompleteStoreError, match="2 of 3"):
        open_store(store_path)
    faults = list(verify(store_path))
    assert any("0000001.json: not part" in fault for fault in faults)
    assert any("shard 1 is not committed" in fault for fault in faults)


def test_swapped_records_are_refused_when_a_store_is_opened(store_path: Path) -> None:
    swap(store_path / "shards/000000.json", store_path / RECORD)
    with pytest.raises(CorruptStoreError, match=r"000000\.json: expected the record of shard 0"):
        open_store(store_path)


def test_a_record_beyond_the_manifest_is_named(store_path: Path) -> None:
    data = (store_path / RECORD).read_bytes()
    (store_path / "shards/000003.json").write_bytes(data)
    faults = list(verify(store_path))
    assert any("000003.json" in fault and "only 3 shards" in fault for fault in faults)


def test_a_folder_without_a_store_gives_one_line(tmp_path: Path) -> None:
    (fault,) = verify(tmp_path)
    assert "no label store here" in fault


def test_a_later_fault_is_found_behind_an_earlier_one(store_path: Path) -> None:
    for name in ("maps.zarr/entries/c.0.0.0.0", ROWS, "shards/000002.json"):
        flip(store_path / name, 90)
    faults = list(verify(store_path))
    for name in ("c.0.0.0.0", "000001.rows.npz", "000002.json"):
        assert sum(name in fault for fault in faults) == 1


# Values under correct hashes


def class_id_out_of_range(entries: Any, _table: Any) -> None:
    entries[6, 1, 2, 4] = 1000 << 8 | entries[6, 1, 2, 4] & 255


def rank_order_broken(entries: Any, _table: Any) -> None:
    entries[6, :2, 0, 0] = [3 << 8 | 10, 4 << 8 | 11]


def labelled_without_class(entries: Any, _table: Any) -> None:
    entries[6, :, 1, 1] = 0


def failed_with_scores(entries: Any, _table: Any) -> None:
    entries[5, 0, 0, 0] = 9 << 8 | 1


def id_in_empty_entry(entries: Any, _table: Any) -> None:
    entries[6, 3, 0, 0] = 9 << 8


def unknown_status(_entries: Any, table: Any) -> None:
    table.status[5] = 9


def pooled_id_out_of_range(_entries: Any, table: Any) -> None:
    table.pooled_ids[6, 0] = 1000


def view_without_area(_entries: Any, table: Any) -> None:
    table.boxes[6] = [0.5, 0.0, 0.5, 1.0]


def view_not_finite(_entries: Any, table: Any) -> None:
    table.boxes[6, 3] = np.nan


@pytest.mark.parametrize(
    ("forgery", "row", "message"),
    [
        (class_id_out_of_range, 6, "class id is out of range"),
        (rank_order_broken, 6, "not in rank order"),
        (labelled_without_class, 6, "no class"),
        (failed_with_scores, 5, "holds scores"),
        (id_in_empty_entry, 6, "empty entry has a class id"),
        (unknown_status, 5, "unknown status"),
        (pooled_id_out_of_range, 6, "pooled class id"),
        (view_without_area, 6, "view"),
        (view_not_finite, 6, "view"),
    ],
)
def test_wrong_values_under_correct_hashes_are_named(
    kit: Any, tmp_path: Path, forgery: Callable[[Any, Any], None], row: int, message: str
) -> None:
    entries, table = kit.write(tmp_path / "s")
    kit.forge(tmp_path / "s", 1, entries, table)
    assert list(verify(tmp_path / "s")) == [], "the forger's tools are right"
    forgery(entries, table)
    kit.forge(tmp_path / "s", 1, entries, table)
    (fault,) = verify(tmp_path / "s")
    assert f"row {row}: " in fault
    assert message in fault
    assert ("c.1.0.0.0" in fault) != ("000001.rows.npz" in fault)


def test_a_record_that_does_not_fit_its_rows_is_named(store_path: Path) -> None:
    content = unseal((store_path / RECORD).read_bytes())
    changes: list[dict[str, Any]] = [{"kl_full": 0.25}, {"kl_quantization": 0.0}, {"failures": {}}]
    for change in changes:
        (store_path / RECORD).write_bytes(seal({**content, **change}))
        (fault,) = verify(store_path)
        assert "000001.json: the record does not fit its row table" in fault


def test_objects_under_other_names_are_not_followed(store_path: Path) -> None:
    content = unseal((store_path / RECORD).read_bytes())
    for name in ("../../etc/passwd", "manifest.json", "/etc/passwd", ""):
        rows = {"name": name, "sha256": "0" * 64, "size": 1}
        (store_path / RECORD).write_bytes(seal({**content, "rows": rows}))
        (fault,) = verify(store_path)
        assert "000001.json" in fault


# Keys


def test_keys_are_held_against_a_source(kit: Any, store_path: Path) -> None:
    keys = list(kit.plan().keys())
    assert list(verify(store_path, keys)) == []
    assert list(verify(store_path, reversed(keys))) == []
    faults = list(verify(store_path, [*keys[1:], "new.jpg", "a.new.jpg"]))
    assert faults == [
        "cats/tom.jpg: in the store, not in the source",
        "a.new.jpg: in the source, not in the store",
        "new.jpg: in the source, not in the store",
    ]
    assert len(list(verify(store_path, []))) == len(keys)


# Reading, not verifying


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """One of the things that disks, networks and hurried people do to a file."""
    changed = bytearray(data)
    start = rng.randrange(len(data))
    run = rng.randint(1, 64)
    kind = rng.randrange(7)
    if kind == 0:
        changed[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        del changed[start : start + run]
    elif kind == 3:
        changed[start : start + run] = bytes(len(changed[start : start + run]))
    elif kind == 4:
        changed[start : start + run] = rng.randbytes(len(changed[start : start + run]))
    elif kind == 5:
        changed[start:start] = rng.randbytes(run)
    else:  # in the index, where lengths and offsets are
        place = len(changed) - 4 - rng.randrange(1, 9) * 8
        changed[place : place + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
    return bytes(changed)


def test_a_damaged_shard_is_never_read_as_something_else(kit: Any, tmp_path: Path) -> None:
    entries, _ = kit.write(tmp_path / "s")
    path = tmp_path / "s" / SHARD
    original = path.read_bytes()
    rng = random.Random(20260)  # noqa: S311 - seeded damage
    caught: list[str] = []
    tracemalloc.start()
    try:
        for _ in range(300):
            path.write_bytes(corrupt(original, rng))
            store = open_store(tmp_path / "s")
            for index, row in ((4, 4), (5, 6), (6, 7)):
                try:
                    read = store.read([index]).entries[0]
                except CorruptStoreError as error:
                    caught.append(str(error))
                else:
                    np.testing.assert_array_equal(read, entries[row])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(caught) > 300
    assert all("c.1.0.0.0" in message for message in caught)
    assert peak < 20e6


def shard_settings(kit: Any) -> Settings:
    settings: Settings = kit.manifest(kit.plan()).settings
    return settings


def test_an_index_under_a_right_checksum_may_still_lie(kit: Any, tmp_path: Path) -> None:
    settings = shard_settings(kit)
    entries, _ = kit.content(settings)
    data = bytearray(encode_shard(settings, 1, entries[4:8]))
    path = tmp_path / "c.1.0.0.0"
    lies = [(2**64 - 1, 2**64 - 1), (0, 2**62), (2**63, 10), (len(data), 1), (0, 0), (0, 3)]
    for offset, length in lies:
        index = np.frombuffer(data[-68:-4], dtype="<u8").copy()
        index[4:6] = offset, length  # of row 6
        body = index.tobytes()
        checksum = google_crc32c.value(body).to_bytes(4, "little")
        path.write_bytes(data[:-68] + body + checksum)
        file = ShardFile(path, settings, 1)
        np.testing.assert_array_equal(file.entries(4), entries[4])
        message = "row 6 is missing" if (offset, length) == lies[0] else "row 6"
        with pytest.raises(CorruptStoreError, match=message):
            file.entries(6)


def test_a_chunk_that_claims_a_wild_size_is_refused(kit: Any, tmp_path: Path) -> None:
    settings = shard_settings(kit)
    entries, _ = kit.content(settings)
    data = encode_shard(settings, 1, entries[4:8])
    path = tmp_path / "c.1.0.0.0"
    offset, length = np.frombuffer(data[-68:-4], dtype="<u8")[:2].tolist()
    for size in (0, 8, 2**31 - 1, 2**32 - 1):
        chunk = bytearray(data[offset : offset + length - 4])
        chunk[4:8] = size.to_bytes(4, "little")
        sealed = bytes(chunk) + google_crc32c.value(bytes(chunk)).to_bytes(4, "little")
        path.write_bytes(data[:offset] + sealed + data[offset + length :])
        with pytest.raises(CorruptStoreError, match="row 4 does not hold 240 bytes"):
            ShardFile(path, settings, 1).entries(4)


def test_a_missing_shard_is_named_when_it_is_read(store_path: Path) -> None:
    store = open_store(store_path)
    (store_path / SHARD).unlink()
    assert len(store.read([0, 8])) == 2
    with pytest.raises(CorruptStoreError, match=r"c\.1\.0\.0\.0: no such file"):
        store["a b/c d.webp"]


def test_a_damaged_row_table_is_named_when_it_is_read(store_path: Path) -> None:
    flip(store_path / ROWS, 2000)
    store = open_store(store_path)
    with pytest.raises(CorruptStoreError, match=r"000001\.rows\.npz"):
        store.info("a b/c d.webp")
