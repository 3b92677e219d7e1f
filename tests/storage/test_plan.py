import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenlabel.storage.errors import SettingsError, StoreFormatError
from tokenlabel.storage.plan import NO_TARGET, Plan

ODD_KEYS = [
    "a.b.c.jpg",
    "a.b",
    "a",
    " leading and trailing ",
    "Größe/猫/🐈.jpg",
    "e\u0301.jpg",  # decomposed: another key than the next
    "\u00e9.jpg",
    "new\nline",
    "",
]


def columns(plan: Plan) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(plan.to_bytes())) as stored:
        return dict(stored)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_a_duplicate_key_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"'b/x.jpg' \(number 1 and 3\)"):
        Plan.of([("a/x.jpg", 0), ("b/x.jpg", 0), ("c", 0), ("b/x.jpg", 1)])


def test_a_key_that_is_not_text_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="not valid UTF-8"):
        Plan.of([("caf\udce9.jpg", 0)])


def test_every_key_finds_its_row_and_comes_back_unchanged() -> None:
    plan = Plan.of((key, NO_TARGET) for key in ODD_KEYS)
    read = Plan.from_bytes(plan.to_bytes(), "plan")
    assert list(read.keys()) == ODD_KEYS
    assert [read.row(key) for key in ODD_KEYS] == list(range(len(ODD_KEYS)))


def test_unknown_keys_have_no_row() -> None:
    plan = Plan.of([("a.jpg", 0), ("b.jpg", 0)])
    for key in ("c.jpg", "", "A.jpg", "a.jpg\0", "\ud800", "caf\udce9.jpg"):
        assert plan.row(key) is None


def test_keys_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenlabel.storage.plan._hash", lambda key: len(key) % 2)
    keys = [f"{'x' * (i % 3)}{i}" for i in range(40)]
    plan = Plan.of((key, 0) for key in keys)
    assert [plan.row(key) for key in keys] == list(range(40))
    assert plan.row("no such key") is None
    assert plan.row("no such key!") is None


def test_hundreds_of_thousands_of_keys_need_no_object_each() -> None:
    count = 200_000
    plan = Plan.of((f"n{i % 1000:08d}/{i}.JPEG", i % 1000) for i in range(count))
    assert len(plan) == count
    for row in range(0, count, 37):
        assert plan.row(f"n{row % 1000:08d}/{row}.JPEG") == row
    assert plan.row(f"n00000000/{count}.JPEG") is None
    assert all(isinstance(column, np.ndarray) for column in vars(plan).values())
    assert sum(column.nbytes for column in vars(plan).values()) < 60 * count


def test_the_digest_changes_with_every_key_target_and_order() -> None:
    samples = [("ab", 0), ("c", 1), ("d", NO_TARGET)]
    digest = Plan.of(samples).digest()
    assert Plan.of(samples).digest() == digest
    assert Plan.from_bytes(Plan.of(samples).to_bytes(), "plan").digest() == digest
    others = [
        [("ab", 0), ("c", 1), ("e", NO_TARGET)],
        [("a", 0), ("bc", 1), ("d", NO_TARGET)],
        [("ab", 0), ("c", 1), ("d", 0)],
        [("c", 1), ("ab", 0), ("d", NO_TARGET)],
        samples[:2],
        [*samples, ("e", 0)],
    ]
    assert len({digest, *(Plan.of(other).digest() for other in others)}) == len(others) + 1


def test_equal_plans_give_equal_bytes() -> None:
    samples = [(key, 3) for key in ODD_KEYS]
    assert Plan.of(samples).to_bytes() == Plan.of(samples).to_bytes()


HOSTILE: dict[str, dict[str, Any]] = {
    "key beyond the bytes": {"key_ends": [1, 2, 99]},
    "keys that run backwards": {"key_ends": [2, 1, 3]},
    "negative key": {"key_ends": [-1, 2, 3]},
    "keys that leave bytes over": {"key_ends": [1, 2, 2]},
    "keys that are no text": {"key_bytes": [255, 98, 99]},
    "row beyond the end": {"hash_rows": [0, 1, 3]},
    "row named twice": {"hash_rows": [0, 1, 1]},
    "negative row": {"hash_rows": [0, -1, 1]},
    "hashes out of order": {"hashes": [3, 2, 1]},
    "a column too short": {"targets": [0, 0]},
    "a column of another type": {"targets": [0.0, 0.0, 0.0]},
    "a column of two dimensions": {"targets": [[0, 0, 0]]},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_columns_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    good = columns(Plan.of([("a", 0), ("b", 1), ("c", 0)]))
    for name, values in change.items():
        column = np.array(values)
        good[name] = column if column.dtype.kind == "f" else column.astype(good[name].dtype)
    with pytest.raises(StoreFormatError, match=r"^the/plan"):
        Plan.from_bytes(npz(**good), "the/plan")


def test_a_key_that_starts_inside_a_character_is_refused() -> None:
    good = columns(Plan.of([("aé", 0), ("b", 1)]))
    good["key_ends"] = np.array([2, 4])
    with pytest.raises(StoreFormatError):
        Plan.from_bytes(npz(**good), "the/plan")


def test_bytes_that_are_no_plan_are_refused() -> None:
    good = Plan.of([("a", 0), ("b", 1), ("c", 0)]).to_bytes()
    single = io.BytesIO()
    np.save(single, np.arange(3))
    pickled = io.BytesIO()
    np.savez(pickled, key_bytes=np.array([{}], dtype=object))
    hostile = [
        b"",
        b"PK\x03\x04",
        b"{}",
        single.getvalue(),
        pickled.getvalue(),
        npz(nothing=np.arange(3)),
        good[:-1],
        good[: len(good) // 2],
    ]
    for data in hostile:
        with pytest.raises(StoreFormatError, match=r"^the/plan"):
            Plan.from_bytes(data, "the/plan")
