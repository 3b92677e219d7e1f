"""The whole road: pixels that say where they are, labelled, stored, augmented and replayed.

A real module reads positions off the pixels and answers with classes that stand for positions.
What the targets say after random crops and flips is compared with the pixels of the crop itself.
"""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from tokenlabel.annotate import DenseAnnotator, Preprocessing, annotate
from tokenlabel.annotate.views import VIEWS, View, place
from tokenlabel.labeling import ReplayMap, targets_from
from tokenlabel.storage import LabelMap, open_store

GRID = 18
TOKENS = 14
CROP = 224
CROPS = 60
SIZES = [(500, 500), (500, 375), (375, 500), (640, 320)]  # (width, height)


def position_coded(width: int, height: int) -> Image.Image:
    """Red is x, green is y in the image frame: 8 bits for each pixel's centre."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = x, y[:, None]
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


class PositionReader(nn.Module):
    """Scores [B, 324, 18, 18]: the position that a cell's pixels say, between the four nearest
    that classes stand for, so that the expected position is exact.

    Args:
        box: (x0, y0, x1, y1) in the image frame; classes stand for points of an 18 x 18 lattice
            over it.
    """

    def __init__(self, box: tuple[float, float, float, float]) -> None:
        super().__init__()
        self.low, self.extent = torch.tensor(box[:2]), torch.tensor(box[2:]) - torch.tensor(box[:2])

    def positions(self) -> Tensor:
        """[C, 2]: x and y that each class stands for."""
        along = (torch.arange(GRID) + 0.5) / GRID
        lattice = torch.stack(torch.meshgrid(along, along, indexing="xy"), dim=-1)
        return self.low + lattice.flatten(0, 1) * self.extent

    def forward(self, images: Tensor) -> Tensor:
        read = nn.functional.adaptive_avg_pool2d(images[:, :2], GRID)  # [B, 2, H, W], x and y
        lattice = torch.arange(GRID, dtype=torch.float32).view(1, GRID, 1, 1)
        at = (read - self.low.view(2, 1, 1)) / self.extent.view(2, 1, 1) * GRID - 0.5
        x, y = ((1 - (at[:, [axis]] - lattice).abs()).clamp_min(0) for axis in (0, 1))
        weights = y[:, :, None] * x[:, None]  # [B, 18 (y), 18 (x), H, W]
        return weights.flatten(1, 2).clamp_min(1e-9).log()


def labelled(folder: Path, view: View, size: tuple[int, int]) -> tuple[LabelMap, Tensor]:
    """The map of the position-coded image of this size, and what its classes stand for."""
    (folder / "images").mkdir()
    position_coded(*size).save(folder / "images" / "image.png")
    side = GRID * 16
    # Classes on the lattice of the view's own cells: "which cell" then has one right answer.
    reader = PositionReader(place(view, size, (side, side), (GRID, GRID)).box)
    plain = Preprocessing((side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
    annotator = DenseAnnotator.from_callable(reader, plain, GRID * GRID)
    annotate(folder / "images", folder / "labels", model=annotator, view=view, workers=0)
    return open_store(folder / "labels")["image.png"], reader.positions()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", VIEWS)
def test_replayed_targets_lie_where_the_pixels_lie(
    tmp_path: Path, view: View, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    width, height = size
    image = position_coded(*size)
    label_map, positions = labelled(tmp_path, view, size)
    transform = v2.Compose(
        [v2.RandomResizedCrop(CROP), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    )
    x0, y0, x1, y1 = label_map.view.box
    # the outermost cell centres that see the image
    cell = torch.tensor([(x1 - x0) / GRID, (y1 - y0) / GRID])
    low = torch.tensor([max(x0, 0.0), max(y0, 0.0)]) + cell / 2
    high = torch.tensor([min(x1, 1.0), min(y1, 1.0)]) - cell / 2
    lost, agreed, inside, outside = [], [], [], []
    for _ in range(CROPS):
        crop, replay_map = transform(image, ReplayMap(label_map, (height, width)))
        pixels = torch.tensor(np.asarray(crop))[..., :2].float() / 255
        side = CROP // TOKENS
        patches = pixels.unflatten(0, (TOKENS, side)).unflatten(2, (TOKENS, side))
        true = patches.mean((1, 3)).flatten(0, 1)  # [N, 2], x and y in the image frame
        extent = patches.flatten(0, 1).amax((0, 1, 2)) - patches.flatten(0, 1).amin((0, 1, 2))
        token = extent / TOKENS
        targets = targets_from([replay_map], (TOKENS, TOKENS))
        q = targets.dense(GRID * GRID)[0]
        lost.append(((q @ positions - true) / token).norm(dim=1))
        nearest = torch.cdist(true / cell, positions / cell).argmin(dim=1)
        agreed.append(q.argmax(dim=1) == nearest)
        counted = targets.weight[0]
        box = torch.tensor([[max(x0, 0), max(y0, 0)], [min(x1, 1), min(y1, 1)]])
        outside.append(((true + token / 2 < box[0]) | (true - token / 2 > box[1])).any(dim=1))
        assert (counted[outside[-1]] == 0).all()
        inside.append(
            ((true - token / 2 >= low) & (true + token / 2 <= high)).all(dim=1) & (counted > 0)
        )
    displaced, top, within = torch.cat(lost), torch.cat(agreed).float(), torch.cat(inside)
    rim = ~within & ~torch.cat(outside)
    report = (
        f"{view} {size}: within {displaced[within].mean():.4f} tokens, top-1 "
        f"{top[within].mean():.4f}; at the rim {displaced[rim].mean():.4f}, {top[rim].mean():.4f}; "
        f"{within.float().mean():.2f} of tokens within"
    )
    logging.getLogger(__name__).info(report)  # pytest --log-cli-level=info
    assert within.float().mean() > 0.3
    assert displaced[within].mean() < 0.05, report
    assert top[within].mean() >= 0.98, report
