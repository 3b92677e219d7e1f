"""A label map that travels with its image through `torchvision.transforms.v2`.

It carries no pixels: crops and flips are composed into one matrix, resizes change only the canvas
that later transforms see, and what cannot be said by this yet is refused. Targets are made from
many of them at once by `targets_from`.
"""

from collections.abc import Callable, Sequence
from typing import Never, Self

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name for it
from torchvision.tv_tensors import BoundingBoxes, Mask

from ..storage.label_map import LabelMap
from . import geometry
from .errors import UnsupportedTransformError
from .replay import replay
from .targets import TokenTargets

__all__ = ["ReplayMap", "targets_from"]


class ReplayMap(Mask):  # type: ignore[misc] # torchvision ships no types
    """A label map and where the current crop lies on its image.

    Pass it beside the image, `transform(image, ReplayMap(label_map, canvas_size))`, through
    transforms of `torchvision.transforms.v2`. Crops, resizes and flips move it, photometric ones
    leave it alone, and every other geometric one raises `UnsupportedTransformError` (AutoAugment,
    RandAugment, TrivialAugmentWide and AugMix: torchvision's own TypeError).

    It is a Mask, because torchvision's composite transforms refuse masks they cannot move but
    hand an unknown type through as it is, silently misaligned. RandomErasing warns that it leaves
    masks alone, which is right here. Indexing and `default_collate` give plain tensors: collate
    with `targets_from`.

    Args:
        label_map: the map of the whole image.
        canvas_size: (height, width) of the upright image in pixels.
        image_from_crop: [3, 3] what part of the image the canvas shows; all of it by default.

    Attributes:
        label_map: the map as it was given.
        canvas_size: (height, width) of the image as it is now.
    """

    label_map: LabelMap
    canvas_size: tuple[int, int]

    def __new__(  # noqa: D102 - the class says how it is made
        cls,
        label_map: LabelMap,
        canvas_size: tuple[int, int],
        image_from_crop: Tensor | None = None,
    ) -> Self:
        if image_from_crop is None:
            image_from_crop = geometry.identity()
        self = image_from_crop.as_subclass(cls)
        self.label_map = label_map
        self.canvas_size = canvas_size
        return self

    @property
    def image_from_crop(self) -> Tensor:
        """float64 [3, 3], crop frame to image frame, as a plain tensor."""
        matrix: Tensor = self.as_subclass(Tensor)
        return matrix

    @classmethod
    def wrap(
        cls, tensor: Tensor, like: "ReplayMap", *, canvas_size: tuple[int, int] | None = None
    ) -> Self:
        """What torchvision calls to keep the rest of a TVTensor when its tensor changes."""
        return cls(like.label_map, canvas_size or like.canvas_size, tensor)

    @classmethod
    def _wrap_output(
        cls, output: object, args: Sequence[object] = (), kwargs: object = None
    ) -> object:
        # Called where an operation keeps a TVTensor's type: clone, to, detach, ...
        del kwargs
        if isinstance(output, Tensor) and isinstance(args[0], ReplayMap):
            return cls.wrap(output, args[0])
        return output

    def __repr__(self) -> str:
        return (
            f"ReplayMap(grid={self.label_map.grid}, canvas_size={self.canvas_size}, "
            f"image_from_crop={self.image_from_crop.tolist()})"
        )


def targets_from(
    replay_maps: Sequence[ReplayMap], token_grid: tuple[int, int], mode: str = "probability"
) -> TokenTargets:
    """Make the targets of a batch of transformed maps, for use in a collate function.

    Args:
        replay_maps: B maps as the transforms left them.
        token_grid: (h, w) of the student.
        mode: see `replay`.

    Returns:
        Targets of B x (h * w) tokens on the CPU.

    Raises:
        ReplayError: see `replay`.
    """
    return replay(
        [replay_map.label_map for replay_map in replay_maps],
        torch.stack([replay_map.image_from_crop for replay_map in replay_maps]),
        token_grid,
        mode,
    )


def _keep(replay_map: ReplayMap, **_: object) -> ReplayMap:
    return replay_map


def _get_size(replay_map: ReplayMap) -> list[int]:
    return list(replay_map.canvas_size)


def _composed(replay_map: ReplayMap, matrix: Tensor, canvas_size: tuple[int, int]) -> ReplayMap:
    return ReplayMap(replay_map.label_map, canvas_size, replay_map.image_from_crop @ matrix)


def _crop(replay_map: ReplayMap, top: int, left: int, height: int, width: int) -> ReplayMap:
    rows, columns = replay_map.canvas_size
    box = (left / columns, top / rows, (left + width) / columns, (top + height) / rows)
    return _composed(replay_map, geometry.image_from_box(box), (height, width))


def _center_crop(replay_map: ReplayMap, output_size: list[int]) -> ReplayMap:
    height, width = output_size * 2 if len(output_size) == 1 else output_size
    rows, columns = replay_map.canvas_size
    return _crop(replay_map, _center(rows, height), _center(columns, width), height, width)


def _center(length: int, cropped: int) -> int:
    """Where torchvision starts a centre crop; it pads what is too short, rounding differently."""
    if cropped > length:
        return -((cropped - length) // 2)
    return round((length - cropped) / 2)


def _resize(
    replay_map: ReplayMap, size: list[int] | None, max_size: int | None = None, **_: object
) -> ReplayMap:
    # A box on the same canvas lets torchvision itself say how large the canvas becomes.
    box = BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=replay_map.canvas_size)
    canvas_size = F.resize(box, size, max_size=max_size).canvas_size
    return ReplayMap.wrap(replay_map.image_from_crop, replay_map, canvas_size=canvas_size)


def _resized_crop(
    replay_map: ReplayMap,
    *,
    top: int,
    left: int,
    height: int,
    width: int,
    size: list[int],
    **_: object,
) -> ReplayMap:
    return _resize(_crop(replay_map, top, left, height, width), size)


def _horizontal_flip(replay_map: ReplayMap) -> ReplayMap:
    return _composed(replay_map, geometry.horizontal_flip(), replay_map.canvas_size)


def _vertical_flip(replay_map: ReplayMap) -> ReplayMap:
    return _composed(replay_map, geometry.vertical_flip(), replay_map.canvas_size)


def _refusal(functional: str, transforms: str) -> Callable[..., Never]:
    def refuse(*_: object, **__: object) -> Never:
        raise UnsupportedTransformError(
            f"label maps cannot follow `{functional}` ({transforms}) yet, expected crops, resizes "
            "and flips: take it out of the transform"
        )

    return refuse


_KERNELS: dict[str, Callable[..., object]] = {
    "get_size": _get_size,
    "to_dtype": _keep,
    "crop": _crop,
    "center_crop": _center_crop,
    "resize": _resize,
    "resized_crop": _resized_crop,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "pad": _refusal("pad", "Pad, RandomZoomOut, RandomCrop with padding"),
    "rotate": _refusal("rotate", "RandomRotation"),
    "affine": _refusal("affine", "RandomAffine"),
    "perspective": _refusal("perspective", "RandomPerspective"),
    "elastic": _refusal("elastic", "ElasticTransform"),
    "five_crop": _refusal("five_crop", "FiveCrop"),
    "ten_crop": _refusal("ten_crop", "TenCrop"),
}
for _functional, _kernel in _KERNELS.items():
    F.register_kernel(_functional, ReplayMap)(_kernel)
