"""Replay: what the label maps of a batch say about the tokens of its crops.

A token of the h x w student grid is a square of the crop. Sub-points of it are carried to the
label map, the cells around each are blended bilinearly, and the token's target is their average.

**Sub-points.** A token has s x s of them, at the centres of s x s equal parts. s is the number of
label cells along the longest side of any token of the sample, rounded up, at least 2 and at most
16. Only where every token of the sample is a cell, to a thousandth, s is 1: the token then gives
the cell back as it is. A sample's targets do not depend on the other samples of its batch.
Positions are rounded to 2^-24 of a cell, which hides float noise and makes bilinear weights exact.

**Edges.** Sub-points outside the view (its box cut to the image) do not count. The others are
clamped to the outermost cell centres that lie inside the image, so cells of letterbox padding
never blend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ..storage.label_map import LabelBatch, LabelMap, affine_probabilities
from .errors import ReplayError
from .geometry import check_image_from_crop, transform_points
from .targets import TokenTargets, merge_repeated

__all__ = ["replay"]

_MAX_SUBPOINTS = 16
_LENGTH_SLACK = 1e-3
_STEPS_PER_CELL = 2.0**24


def replay(
    maps: Sequence[LabelMap] | LabelBatch,
    image_from_crop: Tensor | NDArray[np.floating],
    token_grid: tuple[int, int],
    mode: str = "probability",
    *,
    device: torch.device | str = "cpu",
) -> TokenTargets:
    """Make the targets of a batch of crops from the label maps of their images.

    Args:
        maps: B maps of one grid, one K and one number of classes.
        image_from_crop: [B, 3, 3], crop frame to image frame (see `tokenlabel.labeling.geometry`);
            taken to float64.
        token_grid: (h, w) of the student.
        mode: "probability" blends class distributions; there is no other mode yet.
        device: where the targets are made, and returned.

    Returns:
        Targets of N = h * w tokens in row-major order, each class listed once. `weight` is the
        share of a token's sub-points that counted; a token without any is uniform.
        `class_target` is the average over all sub-points of the crop that counted.

    Raises:
        ReplayError: maps that do not go together, matrices that show no image or are not B many,
            an empty token grid, or an unknown mode.
    """
    if mode != "probability":
        raise ReplayError(f"mode must be 'probability', the only one there is yet, got {mode!r}")
    if len(token_grid) != 2 or min(token_grid) < 1:
        raise ReplayError(f"token_grid must be (h, w) of at least 1 x 1, got {token_grid}")
    field = _CellField.of(maps, device)
    image_from_crop = torch.as_tensor(image_from_crop, dtype=torch.float64, device=device)
    check_image_from_crop(image_from_crop)
    if len(image_from_crop) != len(field.boxes):
        raise ReplayError(
            f"expected one image_from_crop for each of {len(field.boxes)} maps, "
            f"got {len(image_from_crop)}"
        )
    cells, shares, weight = _token_cells(field, image_from_crop, token_grid)

    # The class token sees all sub-points of the crop: its cells are those of all tokens.
    all_cells = torch.arange(field.base.shape[1], device=device)
    counted = (shares * weight.unsqueeze(-1)).flatten(1)
    crop_shares = torch.zeros_like(field.base).scatter_add_(1, cells.flatten(1), counted)
    crop_shares /= weight.sum(1, keepdim=True).clamp_min(1e-9)
    class_target = _blend(
        field,
        all_cells.expand(len(cells), 1, -1),
        crop_shares.unsqueeze(1),
        weight.mean(1, keepdim=True),
    )
    return _blend(field, cells, shares, weight, class_target)


@dataclass(frozen=True)
class _CellField:
    """The maps of a batch as affine-sparse distributions, cells flattened row-major."""

    class_ids: Tensor  # int32 [B, H*W, K]
    excess: Tensor  # float32 [B, H*W, K]
    base: Tensor  # float32 [B, H*W]
    boxes: Tensor  # float64 [B, 4], view boxes (x0, y0, x1, y1) in the image frame
    grid: tuple[int, int]  # (H, W)
    num_classes: int

    @classmethod
    def of(cls, maps: Sequence[LabelMap] | LabelBatch, device: torch.device | str) -> Self:
        if isinstance(maps, LabelBatch):
            class_ids, logits, boxes = maps.class_ids, maps.logits, maps.boxes
            num_classes = maps.num_classes
        else:
            kinds = {(label_map.class_ids.shape, label_map.num_classes) for label_map in maps}
            if len(kinds) != 1:
                raise ReplayError(
                    "expected maps of one shape [K, H, W] and one number of classes, "
                    f"got {sorted(kinds) or 'no map'}"
                )
            class_ids = np.stack([label_map.class_ids for label_map in maps])
            logits = np.stack([label_map.logits for label_map in maps])
            boxes = np.array([label_map.view.box for label_map in maps], dtype=np.float64)
            num_classes = maps[0].num_classes
        base, excess = affine_probabilities(logits, num_classes)

        def cells_last(ranked: NDArray[np.generic]) -> Tensor:
            return torch.as_tensor(ranked, device=device).flatten(2).mT.contiguous()

        return cls(
            cells_last(class_ids),
            cells_last(excess.astype(np.float32)),
            torch.as_tensor(base.astype(np.float32), device=device).flatten(1),
            torch.as_tensor(boxes, device=device),
            (class_ids.shape[-2], class_ids.shape[-1]),
            num_classes,
        )


def _token_cells(
    field: _CellField, image_from_crop: Tensor, token_grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which cells every token is made of.

    Returns:
        cells int64 [B, N, Q], their shares float32 [B, N, Q] summing to 1 where anything counted,
        and the weight float32 [B, N].
    """
    across, down = _Axis.of(field, 0), _Axis.of(field, 1)
    cells_from_image = torch.zeros_like(image_from_crop)
    cells_from_image[:, 0, 0], cells_from_image[:, 0, 2] = across.scale, across.offset
    cells_from_image[:, 1, 1], cells_from_image[:, 1, 2] = down.scale, down.offset
    cells_from_image[:, 2, 2] = 1
    cells_from_crop = cells_from_image @ image_from_crop

    subpoints = _subpoints_per_side(cells_from_crop, token_grid)
    pieces, members = [], []
    for side in subpoints.unique().tolist():
        members.append((subpoints == side).nonzero().squeeze(1))
        u, v = _subpoints(token_grid, side, image_from_crop.device)
        x, y = transform_points(cells_from_crop[members[-1]], u, v)  # [b, N, P]
        left, right, right_share, inside_x = across[members[-1]].neighbours(x)
        upper, lower, lower_share, inside_y = down[members[-1]].neighbours(y)
        counted = inside_x & inside_y
        number = counted.sum(-1)
        corners = [
            (upper, left, (1 - lower_share) * (1 - right_share)),
            (upper, right, (1 - lower_share) * right_share),
            (lower, left, lower_share * (1 - right_share)),
            (lower, right, lower_share * right_share),
        ]
        cells = torch.cat([row * field.grid[1] + column for row, column, _ in corners], -1)
        shares = torch.cat([share * counted for _, _, share in corners], -1)
        shares = shares / number.clamp_min(1).unsqueeze(-1)
        pieces.append((*merge_repeated(cells.int(), shares.float()), number / side**2))

    order = torch.cat(members).argsort()
    length = max(cells.shape[-1] for cells, _, _ in pieces)
    # [b, N, Q] of every piece, Q padded to the longest, in the order of the batch.
    cells, shares = (
        torch.cat([pad(piece[i], (0, length - piece[i].shape[-1])) for piece in pieces])[order]
        for i in (0, 1)
    )
    return cells.long(), shares, torch.cat([weight for _, _, weight in pieces])[order]


def _blend(
    field: _CellField,
    cells: Tensor,
    shares: Tensor,
    weight: Tensor,
    class_target: TokenTargets | None = None,
) -> TokenTargets:
    """Average the distributions of cells [B, N, Q] by their shares [B, N, Q]."""
    batch = torch.arange(len(cells), device=cells.device)[:, None, None]
    base = (shares * field.base[batch, cells]).sum(-1)
    class_ids, excess = merge_repeated(
        field.class_ids[batch, cells].flatten(2),
        (shares.unsqueeze(-1) * field.excess[batch, cells]).flatten(2),
    )
    base = torch.where(weight > 0, base, 1 / field.num_classes)
    return TokenTargets(class_ids, excess, base, weight, class_target, field.num_classes)


def _subpoints_per_side(cells_from_crop: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """How many sub-points along each side the tokens of every sample get: int64 [B]."""
    lines = [
        torch.linspace(0, 1, n + 1, dtype=torch.float64).to(cells_from_crop) for n in token_grid
    ]
    v, u = torch.meshgrid(*lines, indexing="ij")
    x, y = transform_points(cells_from_crop, u, v)  # corners of the tokens, [B, h+1, w+1]
    longest = torch.maximum(
        torch.hypot(x.diff(dim=1), y.diff(dim=1)).amax((1, 2)),
        torch.hypot(x.diff(dim=2), y.diff(dim=2)).amax((1, 2)),
    )
    covered = (longest - _LENGTH_SLACK).ceil()
    # Cell i has its centre at i, so the edges of cells lie at halves.
    to_edge = [(at - 0.5 - (at - 0.5).round()).abs().amax((1, 2)) for at in (x, y)]
    is_cell = (covered == 1) & (torch.maximum(*to_edge) < _LENGTH_SLACK)
    return torch.where(is_cell, 1, covered.clamp(2, _MAX_SUBPOINTS)).long()


def _subpoints(
    token_grid: tuple[int, int], side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The sub-points of every token in the crop frame: x and y, float64 [N, side*side]."""
    h, w = token_grid
    inside = (torch.arange(side, dtype=torch.float64, device=device) + 0.5) / side
    u = (torch.arange(w, device=device)[:, None] + inside) / w  # [w, side]
    v = (torch.arange(h, device=device)[:, None] + inside) / h  # [h, side]
    shape = (h, w, side, side)
    return (
        u[None, :, None, :].expand(shape).reshape(h * w, -1),
        v[:, None, :, None].expand(shape).reshape(h * w, -1),
    )


@dataclass(frozen=True)
class _Axis:
    """One axis of the label grids of a batch, in cells: cell i has its centre at i. All [B]."""

    scale: Tensor  # cells per image side
    offset: Tensor  # where the image begins
    start: Tensor  # where the view begins, and ends
    stop: Tensor
    first: Tensor  # the outermost cells whose centres lie inside the image
    last: Tensor

    @classmethod
    def of(cls, field: _CellField, axis: int) -> Self:
        """Axis 0 is x, axis 1 is y."""
        cells = field.grid[1 - axis]
        begin, end = field.boxes[:, axis], field.boxes[:, axis + 2]
        scale = cells / (end - begin)
        offset = -begin * scale - 0.5
        start = _rounded(begin.clamp_min(0) * scale + offset)
        stop = _rounded(end.clamp_max(1) * scale + offset)
        first, last = start.ceil().clamp_min(0), stop.floor().clamp_max(cells - 1)
        # An image thinner than a cell may lie between two centres; then the nearest one serves,
        # as `last`, which is what positions are clamped to in the end.
        nearest = ((start + stop) / 2).round().clamp(0, cells - 1)
        last = torch.where(first > last, nearest, last)
        return cls(scale, offset, start, stop, first, last)

    def __getitem__(self, members: Tensor) -> Self:
        return type(self)(*(column[members, None, None] for column in vars(self).values()))

    def neighbours(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The cells before and after each position, the share of the latter, what is in view."""
        position = _rounded(position)
        inside = (self.start <= position) & (position <= self.stop)
        position = torch.minimum(torch.maximum(position, self.first), self.last)
        before = position.floor()
        after = torch.minimum(before + 1, self.last)
        return before.long(), after.long(), position - before, inside


def _rounded(position: Tensor) -> Tensor:
    return (position * _STEPS_PER_CELL).round() / _STEPS_PER_CELL
