"""The whole road of a label: a map whose classes encode position beside an image whose pixels do.

The image is transformed by torchvision and read afterwards, so that what is compared with the
targets knows nothing of our matrices.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from tokenlabel.labeling import ReplayMap
from tokenlabel.labeling.replay_map import targets_from
from tokenlabel.storage import GridView, LabelMap

TOKENS, CROP, CROPS = 14, 224, 100
SIZES = [(500, 500), (500, 375), (375, 500), (640, 320)]  # (width, height)


def position_coded(width: int, height: int) -> Tensor:
    """[2, height, width]: x and y of every pixel's centre in the image frame."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def letterbox(width: int, height: int) -> GridView:
    """The view of a padded square image, its short side padded evenly to the long one."""
    margin_x, margin_y = (max(width, height) / side / 2 - 0.5 for side in (width, height))
    return GridView((-margin_x, -margin_y, 1 + margin_x, 1 + margin_y))


def true_positions(images: list[Any]) -> Tensor:
    """[h, w, 2] where the tokens of transformed position-coded images come from."""
    pixels = torch.cat([v2.functional.to_image(image).as_subclass(Tensor) for image in images])
    side = CROP // TOKENS
    tokens: Tensor = pixels.unflatten(1, (TOKENS, side)).unflatten(3, (TOKENS, side)).mean((2, 4))
    return tokens.movedim(0, 2)


def displacements(
    images: list[Any], label_map: LabelMap, size: tuple[int, int], transform: v2.Transform
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: displacement in tokens, whether the top class agrees, and whether the whole
    token lies within the outermost cell centres inside the image."""
    rows, columns = label_map.grid
    x0, y0, x1, y1 = label_map.view.box
    centres = torch.stack(
        [
            (x0 + (torch.arange(columns) + 0.5) / columns * (x1 - x0)).expand(rows, columns),
            (y0 + (torch.arange(rows) + 0.5) / rows * (y1 - y0))[:, None].expand(rows, columns),
        ],
        -1,
    ).flatten(0, 1)
    usable = centres[((centres >= 0) & (centres <= 1)).all(-1)]
    lost, agreed, within = [], [], []
    for _ in range(CROPS):
        *crop, replay_map = transform(*images, ReplayMap(label_map, (size[1], size[0])))
        true = true_positions(crop)
        q = targets_from([replay_map], (TOKENS, TOKENS)).dense(rows * columns)[0]
        replayed = (q @ centres.float()).unflatten(0, (TOKENS, TOKENS))
        token = torch.stack(  # a token's size in the image, from the image itself
            [(true[0, -1] - true[0, 0])[0], (true[-1, 0] - true[0, 0])[1]]
        ).abs() / (TOKENS - 1)
        lost.append(((replayed - true) / token).norm(dim=-1))
        cell = (true - torch.tensor([x0, y0])) / torch.tensor([x1 - x0, y1 - y0])
        cell = (cell * torch.tensor([columns, rows])).floor().long()
        top = q.argmax(-1).unflatten(0, (TOKENS, TOKENS))
        agreed.append(top == cell[..., 1] * columns + cell[..., 0])
        low, high = true - token / 2, true + token / 2
        within.append(((low >= usable.amin(0)) & (high <= usable.amax(0))).all(-1))
    return torch.stack(lost), torch.stack(agreed), torch.stack(within)


@pytest.mark.parametrize("kind", ["tensor", "pil"])
@pytest.mark.parametrize("view", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", SIZES)
def test_replayed_positions_are_true_positions(
    position_map: Callable[..., LabelMap], size: tuple[int, int], view: str, kind: str
) -> None:
    torch.manual_seed(0)
    images: list[Any] = [tv_tensors.Image(position_coded(*size))]
    if kind == "pil":  # it knows no two-channel floats: one image each
        images = [Image.fromarray(channel.numpy()) for channel in position_coded(*size)]
    label_map = position_map(view=letterbox(*size) if view == "letterbox" else None)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(CROP, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
        ]
    )
    lost, agreed, within = displacements(images, label_map, size, transform)
    report = ", ".join(
        f"{name}: {int(tokens.sum())} tokens, displaced {lost[tokens].mean():.4f} on average, "
        f"{lost[tokens].max():.3f} at most, top-1 {agreed[tokens].float().mean():.4f}"
        for name, tokens in (("within", within), ("at the rim", ~within))
    )
    logging.getLogger(__name__).info(report)  # pytest --log-cli-level=info
    assert within.float().mean() > 0.5
    assert lost[within].mean() < 0.05, report
    assert agreed[within].float().mean() >= 0.98, report
    # At the rim a target can say no more than the outermost cell: half a cell off at most.
    assert lost[~within].mean() < 1, report
