"""Small stores made by hand, and the means to damage them.

`lite0_maps.npz` holds real score maps: 24 ImageNet photographs (every 20th class, centre view)
through EfficientNet-Lite0 at 576 pixels. `logits` float32 [24, 6, 18, 18] are the six highest of
a cell in descending order, `class_ids` uint16 theirs, `logsumexp` float32 [24, 18, 18] runs over
all 1,000 classes. Made with `np.savez_compressed` from the top-10 maps that the project was
planned with: images 0, 20, .. 460, ranks 0 to 5.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenlabel.storage.encoding import pack_entries
from tokenlabel.storage.folder import StoreFolder
from tokenlabel.storage.layout import record_object, rows_object, shard_object
from tokenlabel.storage.manifest import Manifest, Settings
from tokenlabel.storage.maps import encode_shard
from tokenlabel.storage.objects import ObjectRef
from tokenlabel.storage.plan import NO_TARGET, Plan
from tokenlabel.storage.records import FAILED, RowTable, ShardRecord
from tokenlabel.storage.writer import StoreWriter

KEYS = (
    "cats/tom.jpg",
    "cats/tom.v2.jpg",
    "dogs/São Bernardo.JPEG",
    "dogs/狗.png",
    "a b/c d.webp",
    "no_extension",
    ".hidden/x.jpg",
    "deep/er/and/deeper.jpg",
    "cats/tom",
    "z.jpg",
)
FAILED_ROW = 5
CLASSES = ["cats", "dogs"]


@dataclass(frozen=True)
class Kit:
    """Makes stores of ten samples in three shards (4, 4, 2); row 5 failed."""

    def plan(self, keys: Iterable[str] = KEYS) -> Plan:
        targets = {"cats": 0, "dogs": 1}
        return Plan.of((key, targets.get(key.partition("/")[0], NO_TARGET)) for key in keys)

    def manifest(self, plan: Plan, **changes: Any) -> Manifest:
        settings = Settings(
            annotator={"model": "by hand", "preprocessing": {"mean": [0.5, 0.5, 0.5]}},
            num_classes=1000,
            levels=[{"grid": [3, 5]}],
            payload="categorical",
            view="letterbox",
            top_k=4,
            step=0.2,
            profile="fast",
            batch_size=2,
            shard_size=4,
            rows=len(plan),
            plan_sha256=plan.digest(),
        )
        names = [f"name of {i}" for i in range(1000)]
        source = {"kind": "folder", "name": "photos", "classes": CLASSES}
        return Manifest(replace(settings, **changes), names, source, {"zarr": "3"})

    def content(
        self, settings: Settings, *, seed: int = 0, failed: Iterable[int] = (FAILED_ROW,)
    ) -> tuple[NDArray[np.uint32], RowTable]:
        """Entries and row table of all rows, valid and different for every seed."""
        rng = np.random.default_rng(seed)
        rows, top_k = settings.rows, settings.top_k
        shape = (rows, top_k, *settings.grid)
        steps = np.sort(rng.integers(1, 256, shape), axis=1)[:, ::-1].astype(np.uint8)
        steps[:, 2:][steps[:, 2:] < 60] = 0  # some cells list fewer classes
        ids = rng.integers(0, settings.num_classes // top_k, shape) * top_k
        ids += np.arange(top_k)[:, None, None]  # all different in a cell
        entries = pack_entries(ids, steps)
        table = RowTable.empty(rows, top_k)
        table.sizes[:] = rng.integers(100, 900, (rows, 2))
        table.orientations[:] = rng.integers(1, 9, rows)
        table.boxes[:] = np.array([0.0, -0.25, 1.0, 1.25]) + rng.uniform(0, 0.1, (rows, 1))
        table.pooled_ids[:] = ids[:, :, 0, 0]
        table.pooled_probabilities[:] = np.sort(rng.uniform(size=(rows, top_k)))[:, ::-1]
        table.kl_quantization[:] = rng.uniform(0, 1e-3, rows)
        table.kl_full[:] = rng.uniform(0, 1, rows)
        for row in failed:
            entries[row] = 0
            for field in fields(RowTable):
                getattr(table, field.name)[row : row + 1] = np.zeros_like(
                    getattr(table, field.name)[row : row + 1]
                )
            table.status[row] = FAILED
            table.reasons[row] = "cannot be decoded: broken data stream"
        return entries, table

    def part(self, table: RowTable, rows: range) -> RowTable:
        """The rows of a shard, out of a table of all rows."""
        return RowTable(
            **{f.name: getattr(table, f.name)[rows.start : rows.stop] for f in fields(RowTable)}
        )

    def write(
        self,
        path: Path,
        *,
        seed: int = 0,
        shards: Iterable[int] | None = None,
        failed: Iterable[int] = (FAILED_ROW,),
        **changes: Any,
    ) -> tuple[NDArray[np.uint32], RowTable]:
        """Write a store, or some of its shards; returns what was put in."""
        plan = self.plan()
        writer = StoreWriter.open(StoreFolder(path), self.manifest(plan, **changes), plan)
        entries, table = self.content(writer.settings, seed=seed, failed=failed)
        for shard in writer.pending() if shards is None else shards:
            rows = writer.settings.shard_rows(shard)
            writer.commit(shard, entries[rows.start : rows.stop], self.part(table, rows))
        writer.folder.clean()
        return entries, table

    def forge(self, path: Path, shard: int, entries: NDArray[np.uint32], table: RowTable) -> None:
        """Replace a shard by other values, all hashes and checksums right."""
        settings = self.manifest(self.plan()).settings
        rows = settings.shard_rows(shard)
        table = self.part(table, rows)
        data = encode_shard(settings, shard, entries[rows.start : rows.stop])
        columns = table.to_bytes()
        record = ShardRecord.of(
            shard,
            rows.start,
            ObjectRef.of(shard_object(shard), data),
            ObjectRef.of(rows_object(shard), columns),
            table,
        )
        (path / shard_object(shard)).write_bytes(data)
        (path / rows_object(shard)).write_bytes(columns)
        (path / record_object(shard)).write_bytes(record.to_bytes())

    def tree(self, root: Path) -> dict[str, str]:
        """Path -> hash of every file and "folder" for every folder."""
        return {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(root.rglob("*"))
        }


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture
def store_path(kit: Kit, tmp_path: Path) -> Path:
    """A complete, sound store that a test may damage."""
    path = tmp_path / "labels"
    kit.write(path)
    return path


@pytest.fixture(scope="session")
def lite0_maps() -> dict[str, NDArray[Any]]:
    with np.load(Path(__file__).parent / "lite0_maps.npz") as maps:
        return dict(maps)
