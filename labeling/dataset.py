"""Images with their label maps, for any `torch.utils.data.DataLoader`.

A sample's image and map go through one transform together; the batch's targets are made at once
when it is collated. What has no label, or no image, is found before the first step.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..images import decode, image_keys, read_image, upright_rgb
from ..storage import GridView, LabelMap, LabelStore, open_store
from ..storage.encoding import MAX_QUANTUM
from .errors import MissingSamplesError, ReplayError, UnreadableImageError
from .replay_map import ReplayMap, targets_from
from .targets import TokenTargets

__all__ = ["ImageLike", "TokenLabelBatch", "TokenLabelCollate", "TokenLabelDataset"]

ImageLike = Image.Image | bytes | str | os.PathLike[str]
"""An image, its encoded bytes, or the path of its file."""

NO_CLASS = -1
_SHOWN = 5
_log = logging.getLogger(__name__)


class TokenLabelBatch(NamedTuple):
    """A collated batch; a `DataLoader` with `pin_memory=True` pins all of it.

    Attributes:
        images: [B, channels, height, width], as the transform made them.
        targets: of the student's tokens and of its class token.
        labels: int64 [B], each image's own class id, -1 where it has none.
    """

    images: Tensor
    targets: TokenTargets
    labels: Tensor


class TokenLabelDataset(Dataset[tuple[Tensor, ReplayMap, int]]):
    """Images and the label maps a store has for them, matched by key.

    Args:
        images: a folder of images, the one that was annotated or a copy of it at any resolution
            (but showing all of each image), or a mapping from keys to images.
        store: a label store, or its path.
        transform: takes (upright RGB PIL image, `ReplayMap`) and returns the image as a tensor
            with the map, such as a `torchvision.transforms.v2.Compose`.
        class_of: gives the class id of a key, or -1. By default the class folders of the store's
            source are numbered in order, if there are as many of them as classes.
        on_missing: what to do with images that have no label: "error", or "hard" to train them on
            their class id, everywhere. Labels that have no image are an error too, or left out
            with "hard".

    Attributes:
        store: the label store.
        keys: of the samples, in order.
        unlabelled: keys of the images that have no label, with the reason.
        imageless: keys of the labels that have no image.

    Raises:
        MissingSamplesError: images or labels are missing; the message lists the first.
    """

    def __init__(
        self,
        images: str | os.PathLike[str] | Mapping[str, ImageLike],
        store: LabelStore | str | os.PathLike[str],
        transform: Callable[[Image.Image, ReplayMap], tuple[Tensor, ReplayMap]],
        *,
        class_of: Callable[[str], int] | None = None,
        on_missing: Literal["error", "hard"] = "error",
    ) -> None:
        self.store = store if isinstance(store, LabelStore) else open_store(store)
        self._images = images if isinstance(images, Mapping) else _Folder(Path(images))
        self._transform = transform
        self._class_of = class_of or _FolderClasses(self.store)
        self.keys = list(self._images)
        failures = self.store.failures
        self.unlabelled = {
            key: failures.get(key, "not in the store") for key in self.keys if key not in self.store
        }
        have = set(self.keys)
        # A store is no mapping: its keys() are its only iterator of keys.
        self.imageless = [key for key in self.store.keys() if key not in have]  # noqa: SIM118
        if on_missing not in {"error", "hard"}:
            raise MissingSamplesError(f"on_missing is 'error' or 'hard', got {on_missing!r}")
        if not self.keys:
            raise MissingSamplesError(f"{images}: there are no images")
        self._check_missing(on_missing)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, ReplayMap, int]:
        """The transformed image, its moved map and its class id (-1: none)."""
        key = self.keys[index]
        image = _load(self._images[key], key)
        label = self._class_of(key)
        label_map = self._hard_map(label) if key in self.unlabelled else self.store[key]
        moved = self._transform(image, ReplayMap(label_map, (image.height, image.width)))
        if not (
            isinstance(moved, tuple)
            and len(moved) == 2
            and isinstance(moved[0], Tensor)
            and isinstance(moved[1], ReplayMap)
        ):
            raise ReplayError(
                f"{key}: the transform must give (image tensor, ReplayMap), got {type(moved)}; "
                "use torchvision.transforms.v2 and end with ToImage and ToDtype"
            )
        return moved[0], moved[1], label

    def _hard_map(self, label: int) -> LabelMap:
        """The class everywhere, as sure as a stored entry can be."""
        settings = self.store.manifest.settings
        shape = (settings.top_k, *settings.grid)
        class_ids, logits = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        class_ids[0], logits[0] = label, MAX_QUANTUM * settings.step
        return LabelMap(class_ids, logits, settings.num_classes, GridView.stretch())

    def _check_missing(self, on_missing: Literal["error", "hard"]) -> None:
        if not self.unlabelled and not self.imageless:
            return
        found = "; ".join(
            f"{len(keys)} {what}, such as {', '.join(keys[:_SHOWN])}"
            for what, keys in (
                (f"of {len(self.keys)} images have no label", list(self.unlabelled)),
                (f"of {len(self.store)} labels have no image", self.imageless),
            )
            if keys
        )
        if on_missing == "error":
            raise MissingSamplesError(
                f"{self.store.path}: {found}. Bring the two together, or pass on_missing='hard' "
                "to train images without a label on their class and leave out the rest"
            )
        num_classes = self.store.manifest.settings.num_classes
        classless = [k for k in self.unlabelled if not 0 <= self._class_of(k) < num_classes]
        if classless:
            raise MissingSamplesError(
                f"{self.store.path}: {len(classless)} images have neither a label nor a class of "
                f"0 to {num_classes - 1}, such as {', '.join(classless[:_SHOWN])}; pass class_of "
                "to give their class ids"
            )
        _log.warning("%s: %s", self.store.path, found)


class TokenLabelCollate:
    """Collates samples of a `TokenLabelDataset`; `default_collate` would lose the maps.

    Args:
        token_grid: (h, w) of the student's tokens, such as `TokenLabelStudent.token_grid`.
        mode: see `replay`.
    """

    def __init__(self, token_grid: tuple[int, int], mode: str = "probability") -> None:
        self._token_grid = token_grid
        self._mode = mode

    def __call__(self, samples: Sequence[tuple[Tensor, ReplayMap, int]]) -> TokenLabelBatch:
        """Stack the images and make the targets of the whole batch at once."""
        images, maps, labels = zip(*samples, strict=True)
        return TokenLabelBatch(
            torch.stack([image.as_subclass(Tensor) for image in images]),
            targets_from(maps, self._token_grid, self._mode),
            torch.tensor(labels),
        )


class _Folder(Mapping[str, ImageLike]):
    """The images below a folder, by their paths below it."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise MissingSamplesError(f"{root}: no such folder of images")
        self._root = root
        self._keys = sorted(image_keys(root))

    def __getitem__(self, key: str) -> ImageLike:
        return self._root / key

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _FolderClasses:
    """Class ids from the store's class folders; a class of its own, so that it can be pickled."""

    def __init__(self, store: LabelStore) -> None:
        names = store.manifest.source["classes"]
        known = len(names) == store.manifest.settings.num_classes
        self._ids = {name: number for number, name in enumerate(names)} if known else {}

    def __call__(self, key: str) -> int:
        return self._ids.get(key.partition("/")[0], NO_CLASS)


def _load(image: ImageLike, key: str) -> Image.Image:
    try:
        if isinstance(image, Image.Image):
            return upright_rgb(image)[0]
        data = image if isinstance(image, bytes) else read_image(Path(image))
        return decode(data)[0]
    except Exception as error:  # decoders raise what they like on damaged files
        raise UnreadableImageError(
            f"{key}: cannot be decoded: {error}; mend it, or leave it out of the images"
        ) from error
