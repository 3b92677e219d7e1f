"""What `inspect --png` draws: labelled regions over the image, and replayed targets over a crop.

A class has one colour in all panels of a picture, so one look tells whether labels lie where they
should. The crop is made by the same transforms and the same replay as in training.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name for it

from .inspection import PALETTE
from .labeling import ReplayMap, targets_from
from .storage import LabelMap
from .storage.errors import SettingsError
from .storage.manifest import Manifest

__all__ = ["Box", "draw_crop", "draw_map"]

Box = tuple[float, float, float, float]

_CROP_SIDE = 224
_TOKEN_GRID = (14, 14)
_OTHER = "#9a9a9a"


def draw_map(image: Image.Image, label_map: LabelMap, manifest: Manifest, title: str) -> Figure:
    """The image, and beside it the image with its labelled regions.

    Args:
        image: upright RGB.
        label_map: of this image.
        manifest: of the store, for the classes' names.
        title: written above.
    """
    top = label_map.class_ids[0]
    colours = _colours(top)
    rows, columns = label_map.grid
    figure, (plain, labelled) = _panels(image.size, image.size)
    _show(plain, image, title)
    _show(labelled, _grey(image), f"{rows}x{columns} cells, most likely class")
    _draw_cells(labelled, image, label_map, colours)
    _legend(figure, colours, top, manifest)
    return figure


def draw_crop(
    image: Image.Image,
    label_map: LabelMap,
    manifest: Manifest,
    title: str,
    box: Box,
    *,
    flip: bool = False,
) -> Figure:
    """The labelled image with a crop marked, and the crop with its replayed token targets.

    Args:
        image: upright RGB.
        label_map: of this image.
        manifest: of the store, for the classes' names.
        title: written above.
        box: (x0, y0, x1, y1) of the crop in the image frame, within [0, 1].
        flip: mirror the crop left to right.

    Raises:
        SettingsError: the box is empty or leaves the image.
    """
    left, top, right, bottom = _pixels(box, image.size)
    crop = (top, left, bottom - top, right - left, [_CROP_SIDE, _CROP_SIDE])
    seen = F.resized_crop(image, *crop)
    moved = F.resized_crop(ReplayMap(label_map, (image.height, image.width)), *crop)
    if flip:
        seen, moved = F.horizontal_flip(seen), F.horizontal_flip(moved)
    targets = targets_from([moved], _TOKEN_GRID)
    probabilities, classes = targets.dense(label_map.num_classes)[0].max(dim=1)
    counted = targets.weight[0] > 0
    tokens = classes.view(_TOKEN_GRID).numpy()
    sure = (probabilities * counted).view(_TOKEN_GRID).numpy()
    colours = _colours(label_map.class_ids[0], tokens)
    figure, (whole, augmented) = _panels(image.size, seen.size)
    _show(whole, _grey(image), title)
    _draw_cells(whole, image, label_map, colours)
    corner, extent = (left, top), (right - left, bottom - top)
    whole.add_patch(Rectangle(corner, *extent, fill=False, edgecolor="white", linewidth=4))
    whole.add_patch(Rectangle(corner, *extent, fill=False, edgecolor="black", linewidth=2))
    mirrored = ", mirrored" if flip else ""
    rows, columns = _TOKEN_GRID
    _show(augmented, _grey(seen), f"the crop{mirrored}, replayed {rows}x{columns} tokens")
    area = (0.0, float(_CROP_SIDE), float(_CROP_SIDE), 0.0)
    augmented.imshow(_tint(tokens, sure, colours), extent=area, interpolation="nearest")
    _legend(figure, colours, tokens, manifest)
    return figure


def _pixels(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    width, height = size
    pixels = round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)
    if not (0 <= pixels[0] < pixels[2] <= width and 0 <= pixels[1] < pixels[3] <= height):
        raise SettingsError(
            f"crop {box} is no box x0,y0,x1,y1 within the image; each lies between 0 and 1, "
            "with x0 < x1 and y0 < y1"
        )
    return pixels


def _grey(image: Image.Image) -> Image.Image:
    """What colours are laid over, so that they mean classes alone."""
    return image.convert("L").convert("RGB")


def _panels(*sizes: tuple[int, int]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [width / height for width, height in sizes]
    return figure, figure.subplots(1, len(sizes), width_ratios=ratios)


def _show(axes: Axes, image: Image.Image, title: str) -> None:
    axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0))
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_cells(
    axes: Axes, image: Image.Image, label_map: LabelMap, colours: dict[int, str]
) -> None:
    x0, y0, x1, y1 = label_map.view.box
    area = (x0 * image.width, x1 * image.width, y1 * image.height, y0 * image.height)
    tint = _tint(label_map.class_ids[0], label_map.top_probabilities(), colours)
    axes.imshow(tint, extent=area, interpolation="nearest")
    axes.set_xlim(0, image.width)  # the grid of a padded view reaches beyond the image
    axes.set_ylim(image.height, 0)


def _colours(*class_ids: NDArray[np.integer]) -> dict[int, str]:
    """Colours of the most frequent classes."""
    every = np.concatenate([part.ravel() for part in class_ids])
    ids, counts = np.unique(every, return_counts=True)
    ranked = ids[np.lexsort((ids, -counts))].tolist()
    return {class_id: colour for class_id, (colour, _) in zip(ranked, PALETTE, strict=False)}


def _tint(
    class_ids: NDArray[np.integer], sure: NDArray[np.floating], colours: dict[int, str]
) -> NDArray[np.float64]:
    """RGBA of each cell: the class's colour, the denser the surer; none where `sure` is 0."""
    tint = np.empty((*class_ids.shape, 4))
    for place in np.ndindex(class_ids.shape):
        opacity = 0.25 + 0.4 * sure[place] if sure[place] > 0 else 0.0
        tint[place] = (*to_rgb(colours.get(int(class_ids[place]), _OTHER)), opacity)
    return tint


def _legend(
    figure: Figure, colours: dict[int, str], shown: NDArray[np.integer], manifest: Manifest
) -> None:
    """Names and shares of the classes in the right panel."""
    shares = {class_id: (shown == class_id).mean() for class_id in colours}
    handles = [
        Patch(color=colour, label=f"{manifest.class_name(class_id)} {shares[class_id]:.0%}")
        for class_id, colour in colours.items()
    ]
    others = 1 - sum(shares.values())
    handles.append(Patch(color=_OTHER, label=f"other classes {others:.0%}"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
