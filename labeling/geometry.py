"""Where a crop lies on its image, as 3 x 3 matrices. Pure geometry: no pixels, no labels.

Frames are unit squares, x right, y down, edges at 0 and 1: **image** over the upright image,
**crop** over what the student sees. A matrix `image_from_crop` (float64) takes homogeneous column
vectors (x, y, 1) of the crop to the image, so what is done to a crop multiplies from the right:
`image_from_crop @ image_from_box(box_in_crop) @ horizontal_flip()`.
"""

import torch
from torch import Tensor

from .errors import ReplayError

__all__ = [
    "check_image_from_crop",
    "horizontal_flip",
    "identity",
    "image_from_box",
    "transform_points",
    "vertical_flip",
]


def identity() -> Tensor:
    """The crop is the whole image: [3, 3]."""
    return torch.eye(3, dtype=torch.float64)


def image_from_box(box: tuple[float, float, float, float]) -> Tensor:
    """The crop is the box (x0, y0, x1, y1) of the image, or of an earlier crop: [3, 3].

    The box may reach beyond [0, 1]; that is how padding is said.
    """
    x0, y0, x1, y1 = box
    return torch.tensor([[x1 - x0, 0, x0], [0, y1 - y0, y0], [0, 0, 1]], dtype=torch.float64)


def horizontal_flip() -> Tensor:
    """The crop is mirrored left to right: [3, 3]."""
    return image_from_box((1.0, 0.0, 0.0, 1.0))


def vertical_flip() -> Tensor:
    """The crop is mirrored top to bottom: [3, 3]."""
    return image_from_box((0.0, 1.0, 1.0, 0.0))


def transform_points(matrices: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the same points through every matrix.

    Args:
        matrices: float64 [B, 3, 3].
        x: float64 [...].
        y: float64 [...].

    Returns:
        x and y in the other frame, [B, ...] each.
    """
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # [3, P]
    carried = (matrices @ points).unflatten(-1, x.shape)
    return carried[:, 0] / carried[:, 2], carried[:, 1] / carried[:, 2]


def check_image_from_crop(image_from_crop: Tensor) -> None:
    """Refuse matrices that do not show an image.

    Args:
        image_from_crop: float64 [B, 3, 3].

    Raises:
        ReplayError: a matrix is not finite, has no inverse, or puts a part of the crop at or
            beyond the horizon of its perspective.
    """
    if image_from_crop.ndim != 3 or image_from_crop.shape[1:] != (3, 3):
        raise ReplayError(
            f"image_from_crop must be [B, 3, 3], one matrix a map, "
            f"got shape {tuple(image_from_crop.shape)}"
        )
    corners = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).to(image_from_crop)
    depth = image_from_crop[:, 2] @ corners.mT  # [B, 4]; one sign, or the horizon runs through
    before_horizon = depth.amin(1) * depth.amax(1) > 0
    # A matrix means the same at any scale: 1 at the crop's first corner gives the determinant a
    # unit, the image's area (with perspective: near that corner).
    area = torch.linalg.det(image_from_crop / depth[:, :1, None]).abs()
    bad = ~(before_horizon & (area > 1e-12) & image_from_crop.isfinite().all((1, 2)))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ReplayError(
            "image_from_crop must be finite, invertible and without a horizon inside the crop, "
            f"but matrix {index} is {image_from_crop[index].tolist()}"
        )
