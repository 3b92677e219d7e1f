import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenlabel.labeling import TokenTargets, replay
from tokenlabel.labeling.errors import ReplayError
from tokenlabel.labeling.geometry import (
    horizontal_flip,
    identity,
    image_from_box,
    vertical_flip,
)
from tokenlabel.storage import GridView, LabelBatch, LabelMap, TokenLabelError
from tokenlabel.storage.encoding import pack_entries
from tokenlabel.storage.label_map import affine_probabilities

Box = tuple[float, float, float, float]
Flips = tuple[bool, bool]


def seen(label_map: LabelMap, box: Box) -> LabelMap:
    return dataclasses.replace(label_map, view=GridView(box))


def stored_excess(label_map: LabelMap) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """float32 [H*W, C] of what the map stores, and the float32 base [H*W]."""
    base, excess = affine_probabilities(label_map.logits, label_map.num_classes)
    dense = np.zeros((label_map.num_classes, *label_map.grid), np.float32)
    rows, columns = np.indices(label_map.grid)
    np.add.at(dense, (label_map.class_ids, rows, columns), excess.astype(np.float32))
    return dense.reshape(label_map.num_classes, -1).T, base.astype(np.float32).ravel()


def class_target_of(targets: TokenTargets) -> TokenTargets:
    assert targets.class_target is not None
    return targets.class_target


def excess_alone(targets: TokenTargets, num_classes: int) -> Tensor:
    return dataclasses.replace(targets, base=torch.zeros_like(targets.base)).dense(num_classes)


# --- An oracle of its own: dense, float64, axis by axis, no matrices. ---------------------------


def oracle_axis(
    view: tuple[float, float],
    crop: tuple[float, float],
    *,
    flip: bool,
    cells: int,
    tokens: int,
    side: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often every token falls on every cell of one axis, and how many points counted."""
    centres = [view[0] + (c + 0.5) / cells * (view[1] - view[0]) for c in range(cells)]
    usable = [c for c in range(cells) if 0 <= centres[c] <= 1]
    hits, counted = np.zeros((tokens, cells)), np.zeros(tokens)
    for token in range(tokens):
        for part in range(side):
            at = (token + (part + 0.5) / side) / tokens
            at = 1 - at if flip else at
            image = crop[0] * (1 - at) + crop[1] * at
            if not max(0, view[0]) <= image <= min(1, view[1]):
                continue
            counted[token] += 1
            cell = (image - view[0]) / (view[1] - view[0]) * cells - 0.5
            cell = min(max(cell, usable[0]), usable[-1])
            below = math.floor(cell)
            hits[token, below] += 1 - (cell - below)
            if cell > below:
                hits[token, below + 1] += cell - below
    return hits, counted


def coincides(label_map: LabelMap, box: Box, token_grid: tuple[int, int]) -> bool:
    """Whether every token is a cell: the crop is a run of whole cells, one a token."""
    for axis in (0, 1):
        view, cells, tokens = (
            (label_map.view.box[axis], label_map.view.box[axis + 2]),
            label_map.grid[1 - axis],
            token_grid[1 - axis],
        )
        begin, end = (
            (at - view[0]) / (view[1] - view[0]) * cells for at in (box[axis], box[axis + 2])
        )
        if abs(begin - round(begin)) > 1e-3 or abs(end - begin - tokens) > 1e-3:
            return False
    return True


def oracle(
    label_map: LabelMap, box: Box, flips: Flips, token_grid: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """[N, C] targets, [N] weights and the [C] class target."""
    x0, y0, x1, y1 = label_map.view.box
    grid, (h, w) = label_map.grid, token_grid
    longest = max(
        grid[1] * (box[2] - box[0]) / (x1 - x0) / w, grid[0] * (box[3] - box[1]) / (y1 - y0) / h
    )
    side = min(16, max(2, math.ceil(longest - 1e-3)))
    if coincides(label_map, box, token_grid):
        side = 1
    across, count_x = oracle_axis(
        (x0, x1), (box[0], box[2]), flip=flips[0], cells=grid[1], tokens=w, side=side
    )
    down, count_y = oracle_axis(
        (y0, y1), (box[1], box[3]), flip=flips[1], cells=grid[0], tokens=h, side=side
    )
    hits = np.einsum("ir,jc->ijrc", down, across).reshape(h * w, -1)
    counted = np.outer(count_y, count_x).ravel()
    p = label_map.probabilities().reshape(label_map.num_classes, -1).T
    uniform = np.full(label_map.num_classes, 1 / label_map.num_classes)
    q = np.where(counted[:, None] > 0, hits @ p / np.maximum(counted, 1)[:, None], uniform)
    pooled = hits.sum(0) @ p / counted.sum() if counted.sum() else uniform
    return q, counted / side**2, pooled


def random_view(rng: np.random.Generator) -> Box:
    """Stretch, letterbox or center."""
    kind = rng.integers(3)
    margin = rng.uniform(0.02, 0.35)
    axis = rng.integers(2)
    if kind == 0:
        return (0.0, 0.0, 1.0, 1.0)
    low, high = (-margin, 1 + margin) if kind == 1 else (margin, 1 - margin)
    return (low, 0.0, high, 1.0) if axis else (0.0, low, 1.0, high)


def random_box(rng: np.random.Generator) -> Box:
    width, height = rng.uniform(0.05, 1.0, 2)
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return (x, y, x + width, y + height)


def matrix(box: Box, flips: Flips) -> Tensor:
    image_from_crop = image_from_box(box)
    if flips[0]:
        image_from_crop = image_from_crop @ horizontal_flip()
    if flips[1]:
        image_from_crop = image_from_crop @ vertical_flip()
    return image_from_crop


def test_replay_equals_a_dense_oracle_on_1000_crops_of_real_maps(
    lite0_maps: list[LabelMap],
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        token_grid = tuple(rng.integers(1, 17, 2).tolist())
        maps = [seen(lite0_maps[i], random_view(rng)) for i in rng.integers(12, size=10)]
        boxes = [random_box(rng) for _ in maps]
        flips = rng.integers(2, size=(10, 2))
        matrices = torch.stack([matrix(b, f) for b, f in zip(boxes, flips, strict=True)])
        targets = replay(maps, matrices, token_grid)
        q, pooled = targets.dense(1000).numpy(), class_target_of(targets).dense(1000).numpy()
        for b, label_map in enumerate(maps):
            expected, weight, expected_pooled = oracle(label_map, boxes[b], flips[b], token_grid)
            np.testing.assert_allclose(q[b], expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(targets.weight[b], weight, rtol=0, atol=1e-6)
            np.testing.assert_allclose(pooled[b, 0], expected_pooled, rtol=0, atol=1e-5)
            assert class_target_of(targets).weight[b, 0] == pytest.approx(weight.mean(), abs=1e-6)


# --- Exactness and symmetry. ---------------------------------------------------------------------


@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_the_whole_image_at_the_maps_own_grid_gives_stored_distributions_bit_for_bit(
    lite0_maps: list[LabelMap], flips: Flips
) -> None:
    targets = replay(lite0_maps, matrix((0, 0, 1, 1), flips).repeat(12, 1, 1), (18, 18))
    excess = excess_alone(targets, 1000).numpy()
    for b, label_map in enumerate(lite0_maps):
        expected, base = stored_excess(label_map)
        cells = np.arange(324).reshape(18, 18)
        flipped = cells[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1].ravel()
        np.testing.assert_array_equal(targets.base[b], base[flipped])
        np.testing.assert_array_equal(excess[b], expected[flipped])
    assert (targets.weight == 1).all()


def test_a_letterbox_view_shown_whole_gives_the_cells_inside_the_image_bit_for_bit(
    lite0_maps: list[LabelMap],
) -> None:
    box = (-0.12, 0.0, 1.12, 1.0)
    label_map = seen(lite0_maps[0], box)
    targets = replay([label_map], image_from_box(box)[None], (18, 18))
    excess, base = stored_excess(label_map)
    centre = -0.12 + (np.arange(324) % 18 + 0.5) / 18 * 1.24
    inside = (centre >= 0) & (centre <= 1)
    np.testing.assert_array_equal(targets.weight[0], inside.astype(np.float32))
    np.testing.assert_array_equal(targets.base[0][inside], base[inside])
    np.testing.assert_array_equal(excess_alone(targets, 1000)[0][inside], excess[inside])


def test_the_flipped_crop_gives_the_flipped_targets(lite0_maps: list[LabelMap]) -> None:
    rng = np.random.default_rng(1)
    boxes = [random_box(rng) for _ in lite0_maps]
    crops = torch.stack([image_from_box(box) for box in boxes])
    q = replay(lite0_maps, crops, (7, 9)).dense(1000).unflatten(1, (7, 9))
    mirrored = replay(lite0_maps, crops @ horizontal_flip(), (7, 9)).dense(1000)
    torch.testing.assert_close(mirrored.unflatten(1, (7, 9)), q.flip(2), rtol=0, atol=1e-6)
    # Flipping first and cropping the mirrored box afterwards is the same crop.
    x0, y0, x1, y1 = boxes[0]
    commuted = horizontal_flip() @ image_from_box((1 - x1, y0, 1 - x0, y1))
    torch.testing.assert_close(commuted, crops[0] @ horizontal_flip())


def test_a_quarter_turn_turns_the_targets(position_map: Callable[..., LabelMap]) -> None:
    turn = torch.tensor([[0.0, -1, 1], [1, 0, 0], [0, 0, 1]])  # crop (u, v) shows image (1 - v, u)
    targets = replay([position_map(6, 6)], turn[None], (6, 6))
    expected = torch.arange(36).reshape(6, 6).mT.flip(0).flatten()
    assert torch.equal(targets.dense(36)[0].argmax(-1), expected)


def test_targets_of_a_sample_do_not_depend_on_its_batch(lite0_maps: list[LabelMap]) -> None:
    rng = np.random.default_rng(2)
    crops = torch.stack([image_from_box(random_box(rng)) for _ in lite0_maps])
    crops[3] = image_from_box((-3, -3, 4, 4))
    together = replay(lite0_maps, crops, (5, 4))
    for b, label_map in enumerate(lite0_maps):
        alone = replay([label_map], crops[b : b + 1], (5, 4))
        for one, batch in ((alone, together), (class_target_of(alone), class_target_of(together))):
            torch.testing.assert_close(
                one.dense(1000)[0], batch.dense(1000)[b], rtol=1e-6, atol=1e-9
            )


def test_a_label_batch_replays_as_its_maps_do(lite0_maps: list[LabelMap]) -> None:
    steps = np.stack([np.rint(m.logits / 0.2).clip(0, 255).astype(np.uint8) for m in lite0_maps])
    entries = pack_entries(np.stack([m.class_ids for m in lite0_maps]), steps)
    boxes = np.tile([-0.1, 0.0, 1.1, 1.0], (12, 1))
    batch = LabelBatch(entries, 0.2, 1000, boxes)
    crops = image_from_box((0.1, 0.2, 0.9, 1.0)).repeat(12, 1, 1)
    one, other = (replay(maps, crops, (14, 14)) for maps in (batch, [batch[b] for b in range(12)]))
    for name in ("class_ids", "excess", "base", "weight"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_every_distribution_sums_to_one(lite0_maps: list[LabelMap]) -> None:
    targets = replay(lite0_maps, image_from_box((-0.2, 0.3, 0.7, 1.4)).repeat(12, 1, 1), (14, 14))
    for part in (targets, class_target_of(targets)):
        torch.testing.assert_close(part.dense(1000).sum(-1), torch.ones(part.base.shape))


# --- Edges. --------------------------------------------------------------------------------------


def test_outside_a_center_view_tokens_have_weight_0_and_are_uniform(
    position_map: Callable[..., LabelMap],
) -> None:
    label_map = position_map(4, 4, GridView((0.25, 0.0, 0.75, 1.0)))
    targets = replay([label_map], identity()[None], (4, 6))
    weight = targets.weight.reshape(4, 6)
    assert torch.equal(weight, torch.tensor([0, 0.5, 1, 1, 0.5, 0]).expand(4, 6))
    outside = targets.dense(16)[0].unflatten(0, (4, 6))[:, [0, 5]]
    assert torch.equal(outside, torch.full((4, 2, 16), 1 / 16))
    assert class_target_of(targets).weight.item() == pytest.approx(0.5)
    # Half of a token outside does not pull its target towards uniform.
    half = targets.dense(16)[0].unflatten(0, (4, 6))[:, 1].unflatten(1, (4, 4))
    torch.testing.assert_close(half[:, :, 0].sum(1), torch.ones(4))


def test_a_crop_without_any_label_is_uniform(position_map: Callable[..., LabelMap]) -> None:
    targets = replay([position_map(4, 4)], image_from_box((2, 2, 3, 3))[None], (3, 3))
    assert (targets.weight == 0).all()
    assert (class_target_of(targets).weight == 0).all()
    assert torch.equal(targets.dense(16), torch.full((1, 9, 16), 1 / 16))
    assert torch.equal(class_target_of(targets).dense(16), torch.full((1, 1, 16), 1 / 16))


def test_beyond_the_outermost_cell_centres_the_outermost_cells_hold(
    position_map: Callable[..., LabelMap],
) -> None:
    corners = [(0, 0, 0.05, 0.05), (0.95, 0, 1, 0.05), (0, 0.95, 0.05, 1), (0.95, 0.95, 1, 1)]
    targets = replay(
        [position_map(6, 6)] * 4, torch.stack([image_from_box(box) for box in corners]), (3, 3)
    )
    expected = torch.tensor([0, 5, 30, 35])
    assert torch.equal(targets.dense(36).argmax(-1), expected[:, None].expand(4, 9))
    assert (targets.dense(36).amax(-1) == 1).all()
    assert (targets.weight == 1).all()


@pytest.mark.parametrize(
    "box", [(-0.3, 0.0, 1.3, 1.0), (0.0, -0.25, 1.0, 1.25), (-0.13, -0.2, 1.4, 1.1)]
)
def test_letterbox_padding_never_blends(lite0_maps: list[LabelMap], box: Box) -> None:
    poison = 7
    x0, y0, x1, y1 = box
    centre = (np.arange(18) + 0.5) / 18
    x, y = x0 + centre * (x1 - x0), y0 + centre * (y1 - y0)
    inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    class_ids = np.where(lite0_maps[0].class_ids == poison, 8, lite0_maps[0].class_ids)
    logits = np.where(inside, lite0_maps[0].logits, 0)
    class_ids[0, ~inside], logits[0, ~inside] = poison, 50
    label_map = LabelMap(class_ids, logits.astype(np.float32), 1000, GridView(box))
    rng = np.random.default_rng(3)
    crops = [identity(), image_from_box(box)]
    crops += [image_from_box(random_box(rng)) for _ in range(50)]
    targets = replay([label_map] * len(crops), torch.stack(crops), (9, 9))
    for part in (targets, class_target_of(targets)):
        assert part.excess.count_nonzero() > 0
        assert not ((part.class_ids == poison) & (part.excess > 0)).any()


@pytest.mark.parametrize(("x0", "nearest"), [(-4.0, 1), (-5.0, 2)])
def test_an_image_thinner_than_a_cell_uses_the_nearest_cell(
    position_map: Callable[..., LabelMap], x0: float, nearest: int
) -> None:
    # Cells of width 2.5, centres at -2.75, -0.25, 2.25, 4.75 or at -3.75, -1.25, 1.25, 3.75.
    label_map = position_map(1, 4, GridView((x0, 0.0, x0 + 10, 1.0)))
    targets = replay([label_map], identity()[None], (2, 3))
    assert (targets.dense(4).argmax(-1) == nearest).all()
    assert (targets.weight == 1).all()


def test_class_ids_survive_up_to_24_bits() -> None:
    ids = np.array([2047, 2048, 2049, 21840, 65535, 65536, 2**24 - 2, 2**24 - 1], np.int32)
    logits = np.full((1, 2, 4), 20, np.float32)
    label_map = LabelMap(ids.reshape(1, 2, 4), logits, 2**24, GridView.stretch())
    targets = replay([label_map], identity()[None], (2, 4))
    assert targets.class_ids.flatten().tolist() == ids.tolist()
    pooled = class_target_of(targets)
    assert pooled.class_ids.flatten().tolist() == ids.tolist()
    torch.testing.assert_close(pooled.excess.sum() + 2**24 * pooled.base.sum(), torch.tensor(1.0))


def test_every_class_is_listed_once_and_padding_is_plain(lite0_maps: list[LabelMap]) -> None:
    targets = replay(lite0_maps, identity().repeat(12, 1, 1), (14, 14))
    for ids, excess in zip(
        targets.class_ids.flatten(0, 1), targets.excess.flatten(0, 1), strict=True
    ):
        listed = ids[excess > 0]
        assert len(listed.unique()) == len(listed)
        assert (ids[excess == 0] == 0).all()


# --- What cannot be replayed. --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_from_crop", "message"),
    [
        (torch.full((1, 3, 3), torch.nan), "finite, invertible"),
        (torch.diag(torch.tensor([torch.inf, 1, 1]))[None], "finite, invertible"),
        (torch.zeros(1, 3, 3), "finite, invertible"),
        (image_from_box((0.5, 0, 0.5, 1))[None], "matrix 0 is"),
        (torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-2, 0, 1]]]), "horizon"),
        (identity(), r"\[B, 3, 3\]"),
        (identity().repeat(2, 1, 1), "each of 1 maps, got 2"),
    ],
)
def test_bad_matrices_are_refused(
    position_map: Callable[..., LabelMap], image_from_crop: Tensor, message: str
) -> None:
    with pytest.raises(ReplayError, match=message):
        replay([position_map(2, 2)], image_from_crop, (2, 2))


def test_other_arguments_that_cannot_be_replayed_are_refused(
    position_map: Callable[..., LabelMap],
) -> None:
    one = identity()[None]
    with pytest.raises(ReplayError, match="mode must be 'probability'"):
        replay([position_map(2, 2)], one, (2, 2), mode="logit")
    with pytest.raises(ReplayError, match="token_grid must be"):
        replay([position_map(2, 2)], one, (0, 2))
    with pytest.raises(ReplayError, match="maps of one shape"):
        replay([position_map(2, 2), position_map(3, 3)], one.repeat(2, 1, 1), (2, 2))
    with pytest.raises(ReplayError, match="no map"):
        replay([], torch.zeros(0, 3, 3), (2, 2))
    assert issubclass(ReplayError, TokenLabelError)
    assert issubclass(ReplayError, ValueError)


def test_a_numpy_matrix_of_any_precision_is_taken(position_map: Callable[..., LabelMap]) -> None:
    targets = replay([position_map(2, 2)], np.eye(3, dtype=np.float32)[None], (2, 2))
    assert isinstance(targets, TokenTargets)
    assert targets.dense(4)[0].argmax(-1).tolist() == [0, 1, 2, 3]


def test_targets_are_near_the_average_over_the_tokens_area(lite0_maps: list[LabelMap]) -> None:
    """Against 24 x 24 points a token; how far the rule may stray is what users are promised."""
    generator = np.random.default_rng(0)
    strayed = []
    for _ in range(40):
        width, height = generator.uniform(0.25, 1.0, 2)
        x0, y0 = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
        box = (x0, y0, x0 + width, y0 + height)
        label_map = lite0_maps[generator.integers(len(lite0_maps))]
        (across, _), (down, _) = (
            oracle_axis((0, 1), box[axis::2], flip=False, cells=18, tokens=14, side=24)
            for axis in (0, 1)
        )
        hits = np.einsum("ir,jc->ijrc", down, across).reshape(14 * 14, -1) / 24**2
        area = hits @ label_map.probabilities().reshape(1000, -1).T
        targets = replay([label_map], image_from_box(box)[None], (14, 14)).dense(1000)[0]
        strayed.append(np.abs(targets.numpy() - area).sum(axis=1) / 2)  # total variation
    assert np.mean(strayed) < 0.015
    assert np.max(strayed) < 0.15
