"""The encoding against an oracle of its own: plain loops over cells in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenlabel.storage import GridView, LabelMap, open_store, verify
from tokenlabel.storage.encoding import (
    DEFAULT_STEP,
    MAX_QUANTUM,
    dequantize,
    pack_entries,
    quantize,
    tail_relative_logits,
    unpack_entries,
)
from tokenlabel.storage.errors import InvalidLabelError
from tokenlabel.storage.folder import StoreFolder
from tokenlabel.storage.writer import StoreWriter

IDS = [0, 2047, 2048, 2049, 21840, 65535, 65536, 2**24 - 1]


# Fields of logits, and what the encoding is given of them


def ranked(logits: NDArray[np.float64], k: int) -> tuple[NDArray[Any], ...]:
    """Class ids, their logits and the log-sum-exp of the others, of logits [C, H, W]."""
    order = np.argsort(-logits, axis=0, kind="stable")
    ids, others = order[:k], order[k:]
    rest = np.logaddexp.reduce(np.take_along_axis(logits, others, axis=0), axis=0)
    return ids, np.take_along_axis(logits, ids, axis=0), rest


def oracle(logits: list[float], k: int, threshold: float) -> tuple[list[int], list[float]]:
    """Ids and tail-relative logits of one cell, by the definition: c = ln p - ln(mean tail p)."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    top = logits[order[0]]
    mass = [math.exp(logits[i] - top) for i in order]
    for listed in range(k, 0, -1):
        tail = math.fsum(mass[listed:]) / (len(logits) - listed)
        relative = [math.log(m) - math.log(tail) for m in mass[:listed]]
        if listed == 1 or relative[-1] > threshold:
            return order[:listed], relative
    raise AssertionError


def decoded(steps: NDArray[np.uint8], ids: NDArray[Any], num_classes: int) -> NDArray[np.float64]:
    """Dense distribution [C, H, W] of steps, by the formula of the design."""
    c = steps.astype(np.float64) * DEFAULT_STEP
    z = num_classes + np.expm1(c).sum(axis=0)
    dense = np.broadcast_to(1 / z, (num_classes, *z.shape)).copy()
    for rank, row, column in zip(*np.nonzero(steps), strict=True):
        cell = row, column
        dense[(ids[rank, row, column], *cell)] = math.exp(c[(rank, *cell)]) / z[cell]
    return dense


@st.composite
def fields_of_logits(draw: st.DrawFn) -> tuple[NDArray[np.float64], int]:
    num_classes = draw(st.integers(2, 40))
    k = draw(st.integers(1, num_classes - 1))
    spread = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0, 4.0, 30.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(scale=spread, size=(num_classes, 2, 3))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    return logits, k


# Class ids


def test_class_ids_of_24_bits_survive_packing() -> None:
    ids = np.array(IDS).reshape(-1, 1, 1)
    steps = np.full(ids.shape, 7, dtype=np.uint8)
    unpacked, unpacked_steps = unpack_entries(pack_entries(ids, steps))
    assert unpacked.ravel().tolist() == IDS
    assert unpacked_steps.ravel().tolist() == [7] * len(IDS)


def test_class_ids_of_24_bits_survive_a_store(kit: Any, tmp_path: Path) -> None:
    plan = kit.plan()
    manifest = kit.manifest(
        plan, num_classes=2**24, top_k=len(IDS), levels=[{"grid": [1, 2]}], shard_size=10
    )
    steps = np.arange(200, 200 - len(IDS), -1, dtype=np.uint8)
    entries = np.empty((10, len(IDS), 1, 2), dtype=np.uint32)
    entries[:] = pack_entries(np.array(IDS), steps)[:, None, None]
    writer = StoreWriter.open(StoreFolder(tmp_path / "s"), manifest, plan)
    _, table = kit.content(writer.settings, failed=())
    writer.commit(0, entries, table)
    assert list(verify(tmp_path / "s")) == []
    label_map = open_store(tmp_path / "s")["z.jpg"]
    assert label_map.class_ids[:, 0, 1].tolist() == IDS
    np.testing.assert_allclose(label_map.logits[:, 0, 1], steps * 0.2, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, 2**24, 2**31])
def test_class_ids_that_do_not_fit_are_refused(bad: int) -> None:
    ids = np.array([3, bad], dtype=np.int64)
    with pytest.raises(InvalidLabelError, match=str(bad)):
        pack_entries(ids, np.ones(2, dtype=np.uint8))


def test_an_absent_entry_is_written_as_zero() -> None:
    entries = pack_entries(np.array([9, 9]), np.array([1, 0], dtype=np.uint8))
    assert entries.tolist() == [9 << 8 | 1, 0]


# Scores


@given(fields_of_logits())
@settings(max_examples=150, deadline=None)
def test_quantised_maps_match_the_oracle(field: tuple[NDArray[np.float64], int]) -> None:
    logits, k = field
    num_classes = len(logits)
    ids, scores, rest = ranked(logits, k)
    steps = quantize(scores, rest, num_classes)
    assert steps.dtype == np.uint8
    assert (steps[0] >= 1).all(), "entry 0 is never absent"
    assert (steps[1:] <= steps[:-1]).all(), "rank order"
    assert np.array_equal(unpack_entries(pack_entries(ids, steps))[0], np.where(steps, ids, 0))
    half = DEFAULT_STEP / 2
    for row, column in np.ndindex(2, 3):
        expected_ids, relative = oracle(logits[:, row, column].tolist(), k, half)
        cell = steps[:, row, column]
        if min(abs(c - half) for c in relative) < 1e-9:
            continue  # on the edge of being dropped: either answer is right
        assert np.count_nonzero(cell) == max(len(relative), 1)
        assert ids[: len(relative), row, column].tolist() == expected_ids
        for rank, c in enumerate(relative):
            stored = cell[rank] * DEFAULT_STEP
            if rank == 0 and c < half:
                assert cell[0] == 1
            elif c > MAX_QUANTUM * DEFAULT_STEP:
                assert cell[rank] == MAX_QUANTUM
            else:
                assert abs(stored - c) <= half + 1e-9
    dense = decoded(steps, ids, num_classes)
    np.testing.assert_allclose(dense.sum(axis=0), 1.0, rtol=1e-12)


@given(fields_of_logits())
@settings(max_examples=100, deadline=None)
def test_decoding_follows_the_formula_of_the_format(
    field: tuple[NDArray[np.float64], int],
) -> None:
    logits, k = field
    num_classes = len(logits)
    ids, scores, rest = ranked(logits, k)
    class_ids, steps = unpack_entries(pack_entries(ids, quantize(scores, rest, num_classes)))
    label_map = LabelMap(
        class_ids, dequantize(steps, DEFAULT_STEP), num_classes, GridView.stretch()
    )
    probabilities = label_map.probabilities()
    np.testing.assert_allclose(probabilities, decoded(steps, ids, num_classes), rtol=1e-4)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, rtol=1e-12)
    in_order = np.take_along_axis(probabilities, ids, axis=0)  # as the annotator ranked them
    assert (np.diff(in_order, axis=0) <= 1e-12).all()
    np.testing.assert_allclose(label_map.top_probabilities(), in_order[0], rtol=1e-12)


@given(fields_of_logits())
@settings(max_examples=100, deadline=None)
def test_unrounded_logits_give_back_the_listed_probabilities(
    field: tuple[NDArray[np.float64], int],
) -> None:
    logits, k = field
    logits = np.clip(logits, -20, 20)
    ids, scores, rest = ranked(logits, k)
    relative = tail_relative_logits(scores, rest, len(logits))
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=0))
    z = len(logits) + np.expm1(relative).sum(axis=0)
    np.testing.assert_allclose(
        np.exp(relative) / z, np.take_along_axis(p, ids, axis=0), rtol=1e-6, atol=1e-12
    )


def test_the_mass_of_a_dropped_entry_joins_the_tail() -> None:
    # 0.7 for one class, 0.034 for the next: hardly more than the other eight have
    p = np.array([0.7, 0.034, *[0.266 / 8] * 8]).reshape(10, 1, 1)
    ids, scores, rest = ranked(np.log(p), 2)
    steps = quantize(scores, rest, 10, step=0.2)
    assert steps.ravel().tolist()[1] == 0
    stale = math.log(0.7) - math.log(0.266 / 8)
    recomputed = math.log(0.7) - math.log(0.3 / 9)
    kept = tail_relative_logits(scores, rest, 10, smallest=0.1).ravel()
    assert kept.tolist() == pytest.approx([recomputed, 0.0])
    assert abs(recomputed - stale) > 1e-3, "the example tells the two apart"
    assert ids[0, 0, 0] == 0


@pytest.mark.parametrize("num_classes", [2, 3, 1000, 2**24])
def test_one_hot_cells_stay_finite_and_certain(num_classes: int) -> None:
    k = min(5, num_classes - 1)
    scores = np.full((k, 1, 1), -np.inf)
    scores[0] = 0.0
    steps = quantize(scores, np.full((1, 1), -np.inf), num_classes)
    assert steps.ravel().tolist() == [MAX_QUANTUM, *[0] * (k - 1)]
    c = float(steps[0, 0, 0]) * DEFAULT_STEP
    assert math.exp(c) / (num_classes + math.expm1(c)) > 1 - 1e-9


@pytest.mark.parametrize("num_classes", [2, 3, 1000])
def test_uniform_cells_list_their_first_class_only(num_classes: int) -> None:
    p = np.full((num_classes, 2, 2), 1 / num_classes)
    ids, scores, rest = ranked(np.log(p), min(5, num_classes - 1))
    entries = pack_entries(ids, quantize(scores, rest, num_classes))
    class_ids, steps = unpack_entries(entries)
    assert (steps[0] == 1).all()
    assert not entries[1:].any()
    assert (class_ids < num_classes).all()
    dense = LabelMap(class_ids, dequantize(steps, 0.2), num_classes, GridView.stretch())
    np.testing.assert_allclose(dense.probabilities(), p, rtol=0.23)


@pytest.mark.parametrize("listed", [0, 4, 9])
def test_a_cell_cannot_list_all_of_its_classes(listed: int) -> None:
    with pytest.raises(InvalidLabelError, match="1 to 3"):
        tail_relative_logits(np.zeros((listed, 1, 1)), np.zeros((1, 1)), 4)


def test_real_maps_lose_next_to_nothing_by_rounding(lite0_maps: dict[str, NDArray[Any]]) -> None:
    k, num_classes = 5, 1000
    divergences = []
    for logits, ids, lse in zip(
        lite0_maps["logits"].astype(np.float64),
        lite0_maps["class_ids"].astype(np.int64),
        lite0_maps["logsumexp"].astype(np.float64),
        strict=True,
    ):
        log_p = logits[:k] - lse  # [K, H, W]
        # float32 sums: at least the sixth class is in the rest
        rest = np.maximum(1 - np.exp(log_p).sum(axis=0), np.exp(logits[k] - lse))
        log_p -= np.log(np.exp(log_p).sum(axis=0) + rest)
        rest = 1 - np.exp(log_p).sum(axis=0)
        steps = quantize(log_p, np.log(rest), num_classes, DEFAULT_STEP)
        assert (np.diff(steps.astype(int), axis=0) <= 0).all()
        cells = np.indices(rest.shape)
        kept = np.broadcast_to(rest / (num_classes - k), (num_classes, *rest.shape)).copy()
        kept[(ids[:k], *cells)] = np.exp(log_p)
        class_ids, back = unpack_entries(pack_entries(ids[:k], steps))
        label_map = LabelMap(
            class_ids, dequantize(back, DEFAULT_STEP), num_classes, GridView.stretch()
        )
        q = label_map.probabilities()
        divergences.append((kept * np.log(kept / q)).sum(axis=0).mean())
        assert (label_map.class_ids[0] == ids[0]).all()
    assert len(divergences) == 24
    assert 0 < np.mean(divergences) <= 5e-4


# LabelMap


@given(fields_of_logits())
@settings(max_examples=60, deadline=None)
def test_from_probabilities_keeps_the_top_and_spreads_the_rest(
    field: tuple[NDArray[np.float64], int],
) -> None:
    logits, k = field
    logits = np.clip(logits, -20, 20)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=0))
    label_map = LabelMap.from_probabilities(p, k)
    ids = np.argsort(-p, axis=0, kind="stable")
    expected = p.copy()
    rest = np.take_along_axis(p, ids[k:], axis=0).mean(axis=0, keepdims=True)
    np.put_along_axis(expected, ids[k:], np.broadcast_to(rest, ids[k:].shape), axis=0)
    np.testing.assert_allclose(label_map.probabilities(), expected, rtol=1e-4, atol=1e-9)
    assert (label_map.class_ids[0] == ids[0]).all()


def test_from_probabilities_lists_fewer_classes_than_there_are() -> None:
    p = np.array([0.5, 0.3, 0.2]).reshape(3, 1, 1)
    label_map = LabelMap.from_probabilities(p, k=99)
    assert label_map.class_ids.shape == (2, 1, 1)
    np.testing.assert_allclose(label_map.probabilities(), p, rtol=1e-6)


def test_from_probabilities_takes_one_hot_and_uniform() -> None:
    p = np.zeros((7, 1, 2))
    p[4, 0, 0] = 1.0
    p[:, 0, 1] = 1 / 7
    label_map = LabelMap.from_probabilities(p)
    assert label_map.class_ids[0, 0, 0] == 4
    np.testing.assert_allclose(label_map.probabilities(), p, atol=1e-9)
    assert not label_map.logits[:, 0, 1].any()


def test_from_probabilities_names_the_first_class_of_a_nearly_uniform_cell() -> None:
    p = np.full((5, 1, 1), 0.2)
    p[3] = np.nextafter(0.2, 1)  # first in rank, yet too little for a logit
    label_map = LabelMap.from_probabilities(p)
    assert label_map.class_ids.ravel().tolist() == [3, 0, 0, 0]
    assert not label_map.logits.any()


@pytest.mark.parametrize(
    ("p", "k", "message"),
    [
        (np.full((3, 2), 1 / 3), 5, "shape"),
        (np.ones((1, 2, 2)), 5, "C >= 2"),
        (np.zeros((3, 0, 2)), 5, "shape"),
        (np.full((3, 1, 1), 0.5), 5, "sum to 1"),
        (np.array([1.5, -0.5]).reshape(2, 1, 1), 5, "negative"),
        (np.full((3, 1, 1), np.nan), 5, "sum to 1"),
        (np.full((3, 1, 1), 1 / 3), 0, "k must"),
    ],
)
def test_from_probabilities_refuses_what_is_no_field_of_distributions(
    p: NDArray[np.float64], k: int, message: str
) -> None:
    with pytest.raises(InvalidLabelError, match=message):
        LabelMap.from_probabilities(p, k)


@pytest.mark.parametrize(
    ("ids", "logits", "num_classes", "message"),
    [
        (np.zeros((2, 1, 1)), np.zeros((1, 1, 1)), 10, "shape"),
        (np.zeros((1, 1)), np.zeros((1, 1)), 10, "shape"),
        (np.zeros((0, 1, 1)), np.zeros((0, 1, 1)), 10, "shape"),
        (np.full((1, 1, 1), 10), np.zeros((1, 1, 1)), 10, "0 to 9"),
        (np.full((1, 1, 1), -1), np.zeros((1, 1, 1)), 10, "0 to 9"),
        (np.zeros((1, 1, 1)), np.full((1, 1, 1), np.inf), 10, "finite"),
        (np.zeros((1, 1, 1)), np.full((1, 1, 1), -0.1), 10, "negative"),
        (np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), 1, "num_classes"),
        (np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), 2**24 + 1, "num_classes"),
    ],
)
def test_a_label_map_refuses_values_that_cannot_be_one(
    ids: NDArray[Any], logits: NDArray[Any], num_classes: int, message: str
) -> None:
    with pytest.raises(InvalidLabelError, match=message):
        LabelMap(ids.astype(np.int32), logits.astype(np.float32), num_classes, GridView.stretch())


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 1), (0, 1, 1, 0), (0, 0, math.nan, 1), (0, 0, math.inf, 1), (1, 0, 2, 1)]
)
def test_a_view_must_be_a_box_on_the_image(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(InvalidLabelError, match="box"):
        GridView(box)
