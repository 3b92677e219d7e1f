"""Where images come from.

A source lists its samples once, in an order that depends on nothing but their keys, and later
gives the bytes of any of them. Every worker opens the source for itself, so a source must be
cheap to pickle.
"""

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..images import EXTENSIONS, image_keys, read_image
from ..storage.errors import SettingsError
from ..storage.plan import NO_TARGET

__all__ = ["ImageFiles", "ImageFolder", "ImageSource"]


class ImageSource(Protocol):
    """What `annotate` needs of a source; implement it to bring your own."""

    def samples(self) -> Iterator[tuple[str, int]]:
        """(key, target) of every sample, in a fixed order.

        The target is an index into the classes of `describe`, or `NO_TARGET`.
        """
        ...

    def read(self, key: str) -> bytes:
        """The encoded image of a sample; raises OSError where it cannot be read."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the source: {"kind", "name", "classes": [names]}."""
        ...


class ImageFolder:
    """Every JPEG, PNG and WebP below a folder, at any depth; the key is the path below it.

    If all images lie in subfolders, the name of the first folder is the sample's class, as in
    torchvision's `ImageFolder`. Hidden files and folders are left out, links are followed.

    Args:
        root: the folder.

    Raises:
        SettingsError: the folder does not exist or holds no image.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        if not self.root.is_dir():
            raise SettingsError(f"{root}: no such folder of images")

    def __reduce__(self) -> tuple[object, ...]:
        return ImageFolder, (self.root,)  # a worker needs the place, not the list

    @cached_property
    def _keys(self) -> list[str]:
        keys = sorted(image_keys(self.root))
        if not keys:
            raise SettingsError(
                f"{self.root}: no images below this folder; "
                f"looked for {', '.join(sorted(EXTENSIONS))}"
            )
        return keys

    @cached_property
    def _classes(self) -> list[str]:
        if not all("/" in key for key in self._keys):
            return []
        return sorted({key.partition("/")[0] for key in self._keys})

    def samples(self) -> Iterator[tuple[str, int]]:
        """(key, target) of every image, in the order of the keys' code points."""
        index = {name: number for number, name in enumerate(self._classes)}
        for key in self._keys:
            yield key, index.get(key.partition("/")[0], NO_TARGET)

    def read(self, key: str) -> bytes:
        """The bytes of a file."""
        return read_image(self.root / key)

    def describe(self) -> dict[str, Any]:
        """Kind, the folder's name (not its path) and its class folders."""
        return {"kind": "folder", "name": self.root.name, "classes": self._classes}


class ImageFiles:
    """Files under keys of your choice, in the order given.

    Args:
        files: (key, path) of each image; keys must be unique.
        name: what the manifest calls the source.
    """

    def __init__(
        self, files: Iterable[tuple[str, str | os.PathLike[str]]], name: str = "files"
    ) -> None:
        self._files = [(key, Path(path).absolute()) for key, path in files]
        self._paths = dict(self._files)
        self._name = name

    def samples(self) -> Iterator[tuple[str, int]]:
        """(key, `NO_TARGET`) of every file, duplicates included: the plan refuses them."""
        return ((key, NO_TARGET) for key, _ in self._files)

    def read(self, key: str) -> bytes:
        """The bytes of a file."""
        return read_image(self._paths[key])

    def describe(self) -> dict[str, Any]:
        """Kind and name; files have no classes."""
        return {"kind": "files", "name": self._name, "classes": []}
