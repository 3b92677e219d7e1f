"""Finding and decoding images, the same for whoever labels them and whoever trains on them."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .storage.errors import SettingsError

__all__ = ["EXTENSIONS", "decode", "image_keys"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""File name endings of images, in lower case."""

_ORIENTATION_TAG = 0x0112


def image_keys(root: Path) -> Iterator[str]:
    """Keys of the images below a folder: posix paths below it, unsorted.

    Hidden files and folders are left out, links are followed.

    Raises:
        SettingsError: a folder cannot be listed.
    """
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = Path(folder).relative_to(root).as_posix()
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield name if below == "." else f"{below}/{name}"


def decode(data: bytes) -> tuple[Image.Image, int]:
    """Decode an image to upright RGB.

    Colour modes go to RGB as Pillow converts them, which is what a student's loader sees too;
    only 16-bit grey is scaled to 8 bits first, where Pillow would clip it.

    Returns:
        The image and the EXIF orientation its file had (1: stored upright).

    Raises:
        OSError: not an image, or a damaged one (truncated files included).
        ValueError: likewise; Pillow raises several kinds.
    """
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; PNG has no wider one
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    return image.convert("RGB"), orientation if orientation in range(1, 9) else 1


def _unreadable(error: OSError) -> None:
    raise SettingsError(f"{error.filename}: cannot list this folder: {error.strerror}") from error
