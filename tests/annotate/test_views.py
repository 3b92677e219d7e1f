import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlabel.annotate.views import Placement, place, render
from tokenlabel.images import decode
from tokenlabel.storage import GridView


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    """Red grows to the right, green grows downwards: pixels that say where they are."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
    ],
)
def test_every_colour_mode_decodes_to_the_same_picture(mode: str, kind: str) -> None:
    original = gradient().convert(mode)
    image, orientation = decode(
        encoded(original, kind, **({"quality": 95} if kind != "PNG" else {}))
    )
    assert image.mode == "RGB"
    assert image.size == (64, 48)
    assert orientation == 1
    difference = np.abs(
        np.asarray(image, dtype=int) - np.asarray(original.convert("RGB"), dtype=int)
    )
    assert difference.mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    image, _ = decode(encoded(Image.fromarray(levels), "PNG"))
    found = np.asarray(image)[..., 0].astype(float)
    assert np.abs(found - levels / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_reported(orientation: int) -> None:
    upright = gradient()
    undo = {  # what a camera held that way stores
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, found = decode(encoded(stored, "PNG", exif=exif))
    assert found == orientation
    assert image.size == upright.size
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_a_truncated_photograph_is_an_error(photos: Path) -> None:
    data = (photos / "coffee.jpg").read_bytes()
    with pytest.raises(OSError, match="truncated"):
        decode(data[: len(data) // 2])


SIZES = [(500, 500), (500, 375), (375, 500), (640, 320), (7, 900), (1, 1)]
INPUTS = [((288, 288), (9, 9)), ((224, 320), (7, 10))]


@pytest.mark.parametrize("view", ["stretch", "letterbox", "center"])
@pytest.mark.parametrize(("size", "target"), list(itertools.product(SIZES, INPUTS)))
def test_the_box_says_where_the_input_lies_on_the_image(
    view: str, size: tuple[int, int], target: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    (height, width), grid = target
    placement = place(view, size, (height, width), grid)  # type: ignore[arg-type]
    box = GridView(placement.box).box
    # corners of the input, carried to the image and back to resized pixels
    for along, extent, at, resized in (
        ((box[0], box[2]), width, placement.offset[0], placement.size[0]),
        ((box[1], box[3]), height, placement.offset[1], placement.size[1]),
    ):
        assert along[0] * resized == pytest.approx(-at)
        assert along[1] * resized == pytest.approx(extent - at)
    if view == "stretch":
        assert box == (0, 0, 1, 1)
    if view == "letterbox":
        assert (box[0] <= 0) & (box[2] >= 1)
        assert (box[1] <= 0) & (box[3] >= 1)
        assert placement.offset[0] % (width / grid[1]) == 0
        assert placement.offset[1] % (height / grid[0]) == 0
    if view == "center":
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1


@pytest.mark.parametrize("view", ["stretch", "letterbox", "center"])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 320)])
def test_rendered_pixels_lie_where_the_box_says(view: str, size: tuple[int, int]) -> None:
    height, width = 96, 128
    placement = place(view, size, (height, width), (6, 8))  # type: ignore[arg-type]
    out = np.full((height, width, 3), 77, dtype=np.uint8)
    render(gradient(*size), placement, Image.Resampling.BILINEAR, out)
    x0, y0, x1, y1 = placement.box
    x = x0 + (np.arange(width) + 0.5) / width * (x1 - x0)
    y = y0 + (np.arange(height) + 0.5) / height * (y1 - y0)
    inside_x, inside_y = (x > 0.02) & (x < 0.98), (y > 0.02) & (y < 0.98)
    seen = out[np.ix_(inside_y, inside_x)].astype(float)
    assert np.abs(seen[..., 0] - 255 * x[inside_x]).max() < 4
    assert np.abs(seen[..., 1] - 255 * y[inside_y][:, None]).max() < 4
    outside = (x < 0) | (x > 1)
    assert (out[:, outside] == 77).all()  # padding is left as it was


def test_stretch_ignores_the_aspect() -> None:
    expected = Placement((320, 224), (0, 0), (0.0, 0.0, 1.0, 1.0))
    assert place("stretch", (10, 999), (224, 320), (7, 10)) == expected
