import json
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tokenlabel.storage import LabelStore, open_store, verify
from tokenlabel.storage.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    InvalidLabelError,
    MissingLabelError,
    SettingsError,
    StoreFormatError,
)
from tokenlabel.storage.folder import StoreFolder
from tokenlabel.storage.layout import plan_object, read_manifest
from tokenlabel.storage.manifest import Manifest
from tokenlabel.storage.objects import canonical_json, seal
from tokenlabel.storage.plan import Plan
from tokenlabel.storage.records import RowTable
from tokenlabel.storage.writer import StoreWriter

KEYS = (
    "cats/tom.jpg",
    "cats/tom.v2.jpg",
    "dogs/São Bernardo.JPEG",
    "dogs/狗.png",
    "a b/c d.webp",
    ".hidden/x.jpg",
    "deep/er/and/deeper.jpg",
    "cats/tom",
    "z.jpg",
)
FAILED_KEY = "no_extension"
ROWS = [0, 1, 2, 3, 4, 6, 7, 8, 9]


def script(text: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own, which knows nothing of this one."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# Reading


def test_a_store_lists_its_labelled_samples_in_the_plans_order(store_path: Path) -> None:
    store = open_store(store_path)
    assert len(store) == len(KEYS)
    assert tuple(store.keys()) == KEYS
    for index, key in enumerate(KEYS):
        assert store.key(index) == key
        assert store.key(index - len(KEYS)) == key
        assert store.index(key) == index
        assert key in store
    assert FAILED_KEY not in store
    assert store.path == store_path
    assert store.committed_shards == store.manifest.settings.num_shards == 3
    assert str(store_path) in repr(store)


def test_maps_come_back_as_they_were_written(kit: Any, tmp_path: Path) -> None:
    entries, table = kit.write(tmp_path / "s")
    store = open_store(str(tmp_path / "s"))
    for index, (key, row) in enumerate(zip(KEYS, ROWS, strict=True)):
        for label_map in (store[key], store[index], store[index - len(KEYS)]):
            assert label_map.num_classes == 1000
            assert label_map.grid == (3, 5)
            assert label_map.view.box == tuple(table.boxes[row].tolist())
            np.testing.assert_array_equal(label_map.class_ids, entries[row] >> 8)
            np.testing.assert_allclose(label_map.logits, (entries[row] & 255) * 0.2, rtol=1e-6)
    assert len(list(store)) == len(KEYS)


def test_bulk_reads_keep_any_order_and_repeats(kit: Any, tmp_path: Path) -> None:
    entries, table = kit.write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    order = [8, 0, 0, -1, 4, 5, 2, 8, 5]
    for indices in (order, np.array(order), tuple(order)):
        batch = store.read(indices)
        assert len(batch) == len(order)
        rows = [ROWS[i] for i in order]
        np.testing.assert_array_equal(batch.entries, entries[rows])
        np.testing.assert_array_equal(batch.boxes, table.boxes[rows])
        assert batch.class_ids.shape == batch.logits.shape == (len(order), 4, 3, 5)
        for place, index in enumerate(order):
            one = store[index]
            np.testing.assert_array_equal(batch[place].class_ids, one.class_ids)
            np.testing.assert_array_equal(batch[place].logits, one.logits)
            np.testing.assert_array_equal(batch.logits[place], one.logits)
            assert batch[place].view == one.view
    assert store.read([]).entries.shape == (0, 4, 3, 5)
    assert store.read([]).boxes.shape == (0, 4)


@pytest.mark.parametrize("indices", [[0.5], np.array([True, False]), ["0"]])
def test_bulk_reads_refuse_what_is_no_index(store_path: Path, indices: Any) -> None:
    with pytest.raises(TypeError):
        open_store(store_path).read(indices)


def test_a_stretched_store_covers_the_whole_image(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s", view="stretch")
    assert open_store(tmp_path / "s")[3].view.box == (0.0, 0.0, 1.0, 1.0)


def test_the_fast_reader_gives_what_zarr_gives(kit: Any, tmp_path: Path) -> None:
    entries, _ = kit.write(tmp_path / "s")
    through_zarr = np.asarray(zarr.open_group(tmp_path / "s" / "maps.zarr", mode="r")["entries"])
    assert through_zarr.dtype == np.uint32
    np.testing.assert_array_equal(through_zarr, entries)
    np.testing.assert_array_equal(
        open_store(tmp_path / "s").read(range(len(KEYS))).entries, through_zarr[ROWS]
    )


def test_info_says_what_is_known_of_a_sample(kit: Any, tmp_path: Path) -> None:
    _, table = kit.write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    for key, row, target in (("cats/tom.v2.jpg", 1, "cats"), ("z.jpg", 9, None)):
        info = store.info(key)
        assert info == store.info(store.index(key))
        assert (info.key, info.target) == (key, target)
        assert info.size == tuple(table.sizes[row])
        assert info.orientation == table.orientations[row]
        assert [c for c, _ in info.pooled] == table.pooled_ids[row].tolist()
        assert [p for _, p in info.pooled] == table.pooled_probabilities[row].tolist()
        assert info.kl_quantization == table.kl_quantization[row]
        assert info.kl_full == table.kl_full[row]


def test_statistics_run_over_labelled_samples_only(kit: Any, tmp_path: Path) -> None:
    _, table = kit.write(tmp_path / "s")
    statistics = open_store(tmp_path / "s").statistics
    assert statistics.kl_full == pytest.approx(table.kl_full[ROWS].mean())
    assert statistics.kl_quantization == pytest.approx(table.kl_quantization[ROWS].mean())
    objects = (tmp_path / "s/maps.zarr/entries").glob("c.*")
    assert statistics.entry_bytes == sum(path.stat().st_size for path in objects)


def test_failed_and_unknown_samples_are_told_apart(store_path: Path) -> None:
    store = open_store(store_path)
    assert store.failures == {FAILED_KEY: "cannot be decoded: broken data stream"}
    with pytest.raises(MissingLabelError, match=r"'no_extension'.*image failed.*broken data"):
        store[FAILED_KEY]
    with pytest.raises(MissingLabelError, match=r"'nobody.jpg'.*such as 'cats/tom.jpg'") as caught:
        store.info("nobody.jpg")
    assert isinstance(caught.value, KeyError)
    assert not str(caught.value).startswith('"'), "no quotes around the message"
    for index in (len(KEYS), -len(KEYS) - 1, 10**9):
        with pytest.raises(MissingLabelError, match=f"{index} is out of range.*9 maps"):
            store[index]
        with pytest.raises(MissingLabelError):
            store.read([0, index])
    assert 0 not in store


# Partial stores


def test_a_partial_store_is_opened_only_on_request(kit: Any, tmp_path: Path) -> None:
    entries, _ = kit.write(tmp_path / "s", shards=[2, 0])
    with pytest.raises(IncompleteStoreError, match=r"2 of 3 shards.*allow_partial"):
        open_store(tmp_path / "s")
    store = open_store(tmp_path / "s", allow_partial=True)
    assert tuple(store.keys()) == (*KEYS[:4], *KEYS[-2:])
    assert store.committed_shards == 2
    np.testing.assert_array_equal(store["z.jpg"].class_ids, entries[9] >> 8)
    np.testing.assert_array_equal(store[4].class_ids, entries[8] >> 8)
    assert "a b/c d.webp" not in store
    with pytest.raises(IncompleteStoreError, match=r"'a b/c d.webp'.*shard 1.*annotate"):
        store["a b/c d.webp"]
    again = pickle.loads(pickle.dumps(store))
    assert tuple(again.keys()) == tuple(store.keys())


def test_a_store_without_any_shard_can_be_opened_on_request(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s", shards=[])
    store = open_store(tmp_path / "s", allow_partial=True)
    assert len(store) == 0
    assert list(store.keys()) == []
    with pytest.raises(MissingLabelError, match="0 maps"):
        store[0]


def test_objects_without_a_record_are_invisible(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s")
    (tmp_path / "s/shards/000001.json").unlink()
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "s")
    assert "a b/c d.webp" not in open_store(tmp_path / "s", allow_partial=True)


# Refusals


def edit_manifest(path: Path, change: Any, *, sealed: bool = False) -> None:
    content = json.loads((path / "manifest.json").read_bytes())
    change(content)
    del content["checksum"]
    data = seal(content) if sealed else canonical_json({**content, "checksum": "0" * 64})
    (path / "manifest.json").write_bytes(data)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreFormatError, match=r"no label store here.*tokenlabel annotate"):
            open_store(path)


def test_a_future_version_is_refused_by_number(store_path: Path) -> None:
    edit_manifest(store_path, lambda content: content.update(spec_version=7), sealed=True)
    with pytest.raises(StoreFormatError, match=r"manifest.json.*version 7.*reads version 1"):
        open_store(store_path)


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "vector"},
        {"profile": "small"},
        {"levels": [{"grid": [3, 5]}, {"grid": [6, 10]}]},
    ],
)
def test_parts_of_the_format_that_are_not_read_yet_are_refused(
    kit: Any, store_path: Path, change: dict[str, Any]
) -> None:
    data = kit.manifest(kit.plan(), **change).to_bytes()
    (store_path / "manifest.json").write_bytes(data)
    with pytest.raises(StoreFormatError, match=r"manifest.json.*newer tokenlabel"):
        open_store(store_path)


@pytest.mark.parametrize("sealed", [False, True])
def test_settings_changed_by_hand_are_refused(store_path: Path, *, sealed: bool) -> None:
    edit_manifest(store_path, lambda content: content["settings"].update(step=0.1), sealed=sealed)
    with pytest.raises(StoreFormatError, match=r"manifest.json"):
        open_store(store_path)


def test_class_names_changed_by_hand_are_refused(store_path: Path) -> None:
    path = store_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"name of 17", b"name of 71", 1))
    with pytest.raises(StoreFormatError, match="changed"):
        open_store(store_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": "other", "spec_version": 1}',
        b'{"format": "tokenlabel"}',
        b'{"format": "tokenlabel", "spec_version": 1}',
        b'{"format": "tokenlabel", "spec_version": 1, "checksum": NaN, "settings": []}',
        seal({"format": "tokenlabel", "spec_version": 1}),
        seal({"format": "tokenlabel", "spec_version": 1, "settings": 3, "objects": []}),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(store_path: Path, data: bytes) -> None:
    (store_path / "manifest.json").write_bytes(data)
    with pytest.raises(StoreFormatError, match=r"manifest\.json"):
        open_store(store_path)


@pytest.mark.parametrize(
    ("name", "value"), [("levels", []), ("shard_size", 0), ("rows", "ten"), ("levels", [{}])]
)
def test_settings_that_make_no_sense_are_refused(
    store_path: Path, name: str, value: object
) -> None:
    edit_manifest(
        store_path, lambda content: content["settings"].update({name: value}), sealed=True
    )
    with pytest.raises(StoreFormatError, match=r"manifest\.json"):
        open_store(store_path)


def test_the_plan_of_another_store_is_refused(kit: Any, store_path: Path) -> None:
    name = plan_object(kit.manifest(kit.plan()).settings)
    (store_path / name).write_bytes(kit.plan(["a", "b"]).to_bytes())
    with pytest.raises(StoreFormatError, match=f"{name}: not the plan"):
        open_store(store_path)


def test_a_missing_plan_is_named(kit: Any, store_path: Path) -> None:
    name = plan_object(kit.manifest(kit.plan()).settings)
    (store_path / name).unlink()
    with pytest.raises(CorruptStoreError, match=name):
        open_store(store_path)


# Processes


def test_a_pickled_store_reads_the_same(kit: Any, tmp_path: Path) -> None:
    entries, _ = kit.write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    store.read([0, 8])
    copy: LabelStore = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.read(range(9)).entries, entries[ROWS])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_parent_that_has_read_may_fork(kit: Any, tmp_path: Path) -> None:
    # large enough for blosc to use its threads
    entries, _ = kit.write(tmp_path / "s", levels=[{"grid": [96, 96]}])
    store = open_store(tmp_path / "s")
    store.read(range(9))
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        sender.send(bool((store.read(range(9)).entries == entries[ROWS]).all()))

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv()
        np.testing.assert_array_equal(store.read(range(9)).entries, entries[ROWS])
    finally:
        process.kill()
        process.join()


def test_a_new_process_reads_a_store_it_was_sent(kit: Any, tmp_path: Path) -> None:
    entries, _ = kit.write(tmp_path / "s")
    store = open_store(tmp_path / "s")
    store.read([0])
    read = script(
        """
        import pickle, sys
        store = pickle.loads(bytes.fromhex(sys.stdin.read()))
        print(store.read(range(len(store))).entries.tobytes().hex())
        """
    )
    answer, _ = read.communicate(pickle.dumps(store).hex(), timeout=60)
    assert bytes.fromhex(answer) == entries[ROWS].tobytes()


# Writing


def test_equal_inputs_give_identical_bytes_in_any_order(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "a")
    kit.write(tmp_path / "b", shards=[2, 0, 1])
    assert kit.tree(tmp_path / "a") == kit.tree(tmp_path / "b")
    kit.write(tmp_path / "c", seed=1)
    assert kit.tree(tmp_path / "a") != kit.tree(tmp_path / "c")


def test_committing_again_changes_no_byte(kit: Any, store_path: Path) -> None:
    before = kit.tree(store_path)
    for seed in (0, 1):
        entries, _ = kit.write(store_path, seed=seed, shards=[0, 1, 2])
    assert kit.tree(store_path) == before
    assert list(verify(store_path)) == []
    stored = open_store(store_path).read(range(9)).entries
    assert not np.array_equal(stored, entries[ROWS]), "the first writer won"


def test_a_commit_broken_off_before_its_record_is_completed(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "whole")
    whole = kit.tree(tmp_path / "whole")
    for removed in (["json"], ["json", "rows.npz"]):
        path = tmp_path / "-".join(removed)
        kit.write(path)
        for kind in removed:
            (path / f"shards/000001.{kind}").unlink()
        kit.write(path)
        assert kit.tree(path) == whole


def test_metadata_that_is_missing_is_completed(kit: Any, store_path: Path) -> None:
    before = kit.tree(store_path)
    for name in ("zarr.json", "entries/zarr.json"):
        (store_path / "maps.zarr" / name).unlink()
    kit.write(store_path)
    assert kit.tree(store_path) == before


def test_unfinished_attempts_that_contradict_each_other_are_refused(
    kit: Any, tmp_path: Path
) -> None:
    kit.write(tmp_path / "s")
    kit.write(tmp_path / "t", failed=(4, 5))
    (tmp_path / "s/shards/000001.json").unlink()
    rows = "shards/000001.rows.npz"
    (tmp_path / "s" / rows).write_bytes((tmp_path / "t" / rows).read_bytes())
    with pytest.raises(CorruptStoreError, match=r"000001\.rows\.npz.*delete both"):
        kit.write(tmp_path / "s")


def test_a_damaged_unfinished_attempt_is_never_committed(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s")
    (tmp_path / "s/shards/000001.json").unlink()
    path = tmp_path / "s/maps.zarr/entries/c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"c\.1\.0\.0\.0"):
        kit.write(tmp_path / "s")
    assert not (tmp_path / "s/shards/000001.json").exists()


def test_shards_of_the_wrong_shape_are_refused(kit: Any, tmp_path: Path) -> None:
    plan = kit.plan()
    writer = StoreWriter.open(StoreFolder(tmp_path / "s"), kit.manifest(plan), plan)
    entries, table = kit.content(writer.settings)
    two = kit.part(table, range(2))
    for bad_entries, bad_table in (
        (entries[:1], two),  # would be broadcast
        (entries[:2], table),
        (entries[:2, :3], two),
        (entries[:2].astype(np.int64), two),
    ):
        with pytest.raises(InvalidLabelError, match="shard 2 takes"):
            writer.commit(2, bad_entries, bad_table)
    assert writer.pending() == [0, 1, 2]


RACER = """
    import sys
    from pathlib import Path
    import numpy as np
    from tokenlabel.storage.folder import StoreFolder
    from tokenlabel.storage.layout import read_manifest
    from tokenlabel.storage.records import RowTable
    from tokenlabel.storage.writer import StoreWriter

    path, content, seed = sys.argv[1:]
    folder = StoreFolder(path)
    writer = StoreWriter(folder, read_manifest(folder).settings)
    with np.load(content) as columns:
        entries = columns["entries"]
        table = {name: columns[name] for name in RowTable.__dataclass_fields__}
    print("ready", flush=True)
    sys.stdin.readline()
    for shard in range(writer.settings.num_shards):  # of one row
        rows = slice(shard, shard + 1)
        part = RowTable(**{name: column[rows] for name, column in table.items()})
        record = writer.commit(shard, entries[rows], part)
        folder.clean()
        print(record.entries.sha256, record.rows.sha256, flush=True)
"""


def test_racing_writers_end_in_one_consistent_store(kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    settings = {"shard_size": 1, "levels": [{"grid": [2, 2]}]}
    kit.write(path, shards=[], **settings)
    racers, candidates = [], []
    for seed in range(3):
        entries, table = kit.content(read_manifest(StoreFolder(path)).settings, seed=seed)
        candidates.append(entries)
        content = tmp_path / f"{seed}.npz"
        columns = {name: getattr(table, name) for name in RowTable.__dataclass_fields__}
        np.savez(content, entries=entries, **columns)
        racers.append(script(RACER, path, content, seed))
    answers = []
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        answers = [racer.communicate(timeout=60)[0] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert answers[0] == answers[1] == answers[2], "all agree on who won"
    assert len(answers[0].splitlines()) == 10
    assert list(verify(path)) == []
    stored = open_store(path).read(range(9)).entries
    for place, row in enumerate(ROWS):
        assert any((stored[place] == entries[row]).all() for entries in candidates)


# Continuing


def open_again(kit: Any, path: Path, keys: Any = None, **changes: Any) -> StoreWriter:
    plan: Plan = kit.plan() if keys is None else kit.plan(keys)
    manifest: Manifest = kit.manifest(plan, **changes)
    return StoreWriter.open(StoreFolder(path), manifest, plan)


def test_a_store_is_continued_where_it_stopped(kit: Any, tmp_path: Path) -> None:
    kit.write(tmp_path / "s", shards=[1])
    assert open_again(kit, tmp_path / "s").pending() == [0, 2]
    kit.write(tmp_path / "s")
    assert open_again(kit, tmp_path / "s").pending() == []
    assert len(open_store(tmp_path / "s")) == 9


def test_other_settings_are_refused_naming_each_difference(kit: Any, store_path: Path) -> None:
    before = kit.tree(store_path)
    with pytest.raises(SettingsError) as caught:
        open_again(
            kit,
            store_path,
            batch_size=16,
            top_k=3,
            annotator={"model": "another", "preprocessing": {"mean": [0.5, 0.4, 0.5]}},
        )
    message = str(caught.value)
    assert "batch_size: 2 in the store, now 16" in message
    assert "top_k: 4 in the store, now 3" in message
    assert "annotator.model: by hand in the store, now another" in message
    assert "annotator.preprocessing.mean" in message
    assert "shard_size" not in message
    assert kit.tree(store_path) == before


def test_settings_that_are_equal_in_json_are_equal(kit: Any, store_path: Path) -> None:
    annotator = {"preprocessing": {"mean": (0.5, 0.5, 0.5)}, "model": "by hand"}
    assert open_again(kit, store_path, annotator=annotator).pending() == []
    with pytest.raises(SettingsError) as caught:
        open_again(kit, store_path, annotator=annotator, batch_size=3)
    assert "mean" not in str(caught.value)


def test_a_changed_source_names_the_samples_gone_and_new(kit: Any, store_path: Path) -> None:
    keys = [key for key in (*KEYS, FAILED_KEY) if key != "z.jpg"]
    with pytest.raises(SettingsError, match=r"1 samples gone \(such as 'z.jpg'\)\. "):
        open_again(kit, store_path, keys)
    with pytest.raises(SettingsError, match=r"1 samples gone.*2 new samples \(such as 'new1'\)"):
        open_again(kit, store_path, [*keys, "new1", "new2"])
    with pytest.raises(SettingsError, match="another order"):
        open_again(kit, store_path, sorted((*KEYS, FAILED_KEY)))


def test_a_folder_with_other_files_is_refused_and_left_alone(kit: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    before = kit.tree(tmp_path)
    with pytest.raises(SettingsError, match=r"thesis\.tex"):
        kit.write(tmp_path)
    assert kit.tree(tmp_path) == before


def test_a_run_stopped_before_its_manifest_leaves_the_folder_free(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = StoreFolder.publish
    for published in range(4):  # plan, manifest, two metadata objects
        path = tmp_path / str(published)
        calls = iter(range(published))

        def broken(folder: StoreFolder, name: str, data: bytes, calls: Any = calls) -> bool:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return publish(folder, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(StoreFolder, "publish", broken)
            with pytest.raises(KeyboardInterrupt):
                kit.write(path)
        if published < 2:
            # no manifest yet: other settings may take the folder, and get their own metadata
            entries, _ = kit.write(path, levels=[{"grid": [4, 6]}])
        else:
            entries, _ = kit.write(path)
        assert list(verify(path)) == []
        through_zarr = zarr.open_group(path / "maps.zarr", mode="r")["entries"]
        np.testing.assert_array_equal(np.asarray(through_zarr), entries)


def test_a_source_named_in_other_bytes_than_utf8_is_stored(kit: Any, tmp_path: Path) -> None:
    plan = kit.plan()
    manifest = kit.manifest(plan)
    manifest.source["name"] = "caf\udce9"
    StoreWriter.open(StoreFolder(tmp_path / "s"), manifest, plan)
    store = open_store(tmp_path / "s", allow_partial=True)
    assert store.manifest.source["name"] == "caf\udce9"
