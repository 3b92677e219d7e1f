"""Finding and decoding images, the same for whoever labels them and whoever trains on them."""

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .storage.errors import SettingsError

__all__ = ["EXTENSIONS", "decode", "image_keys", "read_image", "upright_rgb"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""File name endings of images, in lower case."""

_ORIENTATION_TAG = 0x0112


def image_keys(root: Path) -> Iterator[str]:
    """Keys of the images below a folder: posix paths below it, unsorted.

    Hidden files and folders are left out, links are followed, but not in circles.

    Raises:
        SettingsError: a folder cannot be listed.
    """
    return _image_keys(root, "", frozenset())


def _image_keys(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[str]:
    try:
        status = folder.stat()
        place = (status.st_dev, status.st_ino)
        if place in ancestors:
            return  # a link to a folder that it lies in: its images have been found
        with os.scandir(folder) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found]
    except OSError as error:
        raise SettingsError(f"{folder}: cannot list this folder: {error.strerror}") from error
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        if is_folder:
            yield from _image_keys(folder / name, f"{prefix}{name}/", ancestors | {place})
        elif Path(name).suffix.lower() in EXTENSIONS:
            yield prefix + name


def read_image(path: Path) -> bytes:
    """The bytes of an image's file.

    Raises:
        OSError: it cannot be read, or it is no file: reading a pipe would wait for ever.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def decode(data: bytes) -> tuple[Image.Image, int]:
    """Decode an image to upright RGB; see `upright_rgb`.

    Returns:
        The image and the EXIF orientation its file had (1: stored upright).

    Raises:
        OSError: not an image, or a damaged one (truncated files included).
        ValueError: likewise; Pillow raises several kinds.
    """
    return upright_rgb(Image.open(io.BytesIO(data)))


def upright_rgb(image: Image.Image) -> tuple[Image.Image, int]:
    """Turn an image upright and into RGB.

    Colour modes go to RGB as Pillow converts them, which is what a student's loader sees too;
    only 16-bit grey is scaled to 8 bits first, where Pillow would clip it.

    Returns:
        The image and the EXIF orientation it had (1: stored upright).
    """
    image.load()
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; PNG has no wider one
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    return image.convert("RGB"), orientation if orientation in range(1, 9) else 1
