"""What an annotator sees of an image: where it lies on the input, and drawing it there."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["VIEWS", "Placement", "View", "place", "render"]

View = Literal["stretch", "letterbox", "center"]
VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True)
class Placement:
    """Where the resized image lies on the annotator's input, in input pixels.

    Attributes:
        size: (width, height) the image is resized to.
        offset: (x, y) of its top left corner; negative where the input crops it.
        box: (x0, y0, x1, y1) of the input in the image frame, the box of a `GridView`.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    box: tuple[float, float, float, float]


def place(
    view: View, image_size: tuple[int, int], input_size: tuple[int, int], grid: tuple[int, int]
) -> Placement:
    """Fit an image on the annotator's input.

    `stretch` resizes the whole image to the whole input. `letterbox` keeps the aspect (to a
    pixel) and pads right and below, left and above by whole cells. `center` resizes the short
    side and crops the centre.

    Args:
        view: which of the three.
        image_size: (width, height) of the upright image, pixels.
        input_size: (height, width) of the annotator's input, pixels.
        grid: (H, W) cells on that input.
    """
    (width, height), (input_height, input_width) = image_size, input_size
    if view == "stretch":
        return Placement((input_width, input_height), (0, 0), (0.0, 0.0, 1.0, 1.0))
    ratios = input_width / width, input_height / height
    scale = min(ratios) if view == "letterbox" else max(ratios)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    free = input_width - size[0], input_height - size[1]  # padding, or minus what is cropped
    if view == "letterbox":
        cell = input_width / grid[1], input_height / grid[0]
        offset = tuple(round(f / c // 2 * c) for f, c in zip(free, cell, strict=True))
    else:
        offset = tuple(f // 2 for f in free)
    x, y = offset
    box = (
        -x / size[0],
        -y / size[1],
        (input_width - x) / size[0],
        (input_height - y) / size[1],
    )
    return Placement(size, (x, y), box)


def render(
    image: Image.Image, placement: Placement, resample: Image.Resampling, out: NDArray[np.uint8]
) -> None:
    """Draw an image on the annotator's input.

    Args:
        image: upright RGB.
        placement: from `place`.
        resample: Pillow's filter.
        out: uint8 [height, width, 3], set to the pixels; padding keeps what was there.
    """
    pixels = np.asarray(image.resize(placement.size, resample))
    (x, y), (height, width) = placement.offset, out.shape[:2]
    left, top = max(-x, 0), max(-y, 0)
    seen = pixels[top : top + height - max(y, 0), left : left + width - max(x, 0)]
    x, y = max(x, 0), max(y, 0)
    out[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
