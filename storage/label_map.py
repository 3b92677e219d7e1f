"""The nouns of a label store: where a grid lies on its image, one map, a batch of maps."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .encoding import (
    DEFAULT_STEP,
    MAX_CLASSES,
    MAX_QUANTUM,
    dequantize,
    tail_relative_logits,
    unpack_entries,
)
from .errors import InvalidLabelError

__all__ = ["GridView", "LabelBatch", "LabelMap", "affine_probabilities"]


def affine_probabilities(
    logits: NDArray[np.floating], num_classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Split tail-relative logits into what every class has and what the listed ones have more.

    Args:
        logits: [..., K, H, W] tail-relative logits.
        num_classes: C.

    Returns:
        `base` [..., H, W], the probability of an unlisted class, and `excess` [..., K, H, W],
        what is added to it for the listed ones. C * base + sum of excess is 1.
    """
    gain = np.expm1(logits.astype(np.float64))
    base = 1.0 / (num_classes + gain.sum(axis=-3))
    return base, gain * np.expand_dims(base, -3)


@dataclass(frozen=True)
class GridView:
    """What part of the image a label grid covers.

    Attributes:
        box: (x0, y0, x1, y1) of the grid in the image frame (unit square over the upright image,
            x right, y down). It reaches beyond [0, 1] where the image was padded (letterbox) and
            stays inside it where the image was cropped (center).
    """

    box: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box
        if not (np.isfinite(self.box).all() and x0 < x1 and y0 < y1):
            raise InvalidLabelError(
                f"a view's box must be finite with x0 < x1 and y0 < y1, got {self.box}"
            )
        if x1 <= 0 or y1 <= 0 or x0 >= 1 or y0 >= 1:
            raise InvalidLabelError(f"a view's box must overlap the image [0, 1], got {self.box}")

    @classmethod
    def stretch(cls) -> Self:
        """The whole image, whatever its aspect."""
        return cls((0.0, 0.0, 1.0, 1.0))


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The dense label of one image: ranked classes for each cell of an H x W grid.

    Attributes:
        class_ids: int32 [K, H, W], in rank order; 0 where an entry is absent.
        logits: float32 [K, H, W], tail-relative (see `tokenlabel.storage.encoding`), descending
            along K; 0 where an entry is absent.
        num_classes: C.
        view: where the grid lies on the image.
    """

    class_ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    num_classes: int
    view: GridView

    def __post_init__(self) -> None:
        shape = self.class_ids.shape
        if len(shape) != 3 or 0 in shape or shape != self.logits.shape:
            raise InvalidLabelError(
                "a label map needs class_ids and logits of one shape [K, H, W], none of them 0, "
                f"got {self.class_ids.shape} and {self.logits.shape}"
            )
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise InvalidLabelError(
                f"num_classes must be 2 to {MAX_CLASSES}, got {self.num_classes}"
            )
        if not 0 <= self.class_ids.min() <= self.class_ids.max() < (self.num_classes):
            raise InvalidLabelError(
                f"class ids must lie in 0 to {self.num_classes - 1}, "
                f"got {self.class_ids.min()} to {self.class_ids.max()}"
            )
        if not (np.isfinite(self.logits).all() and (self.logits >= 0).all()):
            raise InvalidLabelError("tail-relative logits must be finite and not negative")

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.class_ids.shape[1], self.class_ids.shape[2]

    def probabilities(self) -> NDArray[np.float64]:
        """The class distribution of every cell, dense: [C, H, W], summing to 1 over C."""
        base, excess = affine_probabilities(self.logits, self.num_classes)
        dense = np.broadcast_to(base, (self.num_classes, *base.shape)).copy()
        rows, columns = np.indices(self.grid)
        np.add.at(dense, (self.class_ids, rows, columns), excess)
        return dense

    def top_probabilities(self) -> NDArray[np.float64]:
        """The probability of every cell's first class: [H, W]."""
        base, excess = affine_probabilities(self.logits, self.num_classes)
        top: NDArray[np.float64] = base + excess[0]
        return top

    @classmethod
    def from_probabilities(
        cls,
        probabilities: NDArray[np.floating],
        k: int = 5,
        view: GridView | None = None,
    ) -> Self:
        """Keep the top k of dense distributions and spread the rest evenly; nothing is rounded.

        Ties rank by class id. Entries that do not exceed the tail are absent, and logits are
        clamped where a store would clamp them (255 steps of 0.2).

        Args:
            probabilities: [C, H, W], not negative, summing to 1 over C within 1e-3.
            k: entries a cell keeps; at most C - 1 are kept.
            view: where the grid lies; the whole image by default.

        Raises:
            InvalidLabelError: the array is no such field of distributions.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 3 or p.shape[0] < 2 or p.size == 0:
            raise InvalidLabelError(
                f"expected probabilities [C, H, W] with C >= 2, got shape {p.shape}"
            )
        if k < 1:
            raise InvalidLabelError(f"k must be at least 1, got {k}")
        if not (p >= 0).all() or not np.allclose(p.sum(axis=0), 1.0, rtol=0.0, atol=1e-3):
            raise InvalidLabelError("probabilities must not be negative and sum to 1 in every cell")
        num_classes = p.shape[0]
        order = np.argsort(-p, axis=0, kind="stable")
        ids = order[: min(k, num_classes - 1)]
        rest = np.take_along_axis(p, order[ids.shape[0] :], axis=0).sum(axis=0)
        with np.errstate(divide="ignore"):
            logits = tail_relative_logits(
                np.log(np.take_along_axis(p, ids, axis=0)),
                np.log(rest),
                num_classes,
                smallest=1e-9,  # float noise of a uniform distribution is no entry
            )
        present = logits > 0
        present[0] = True
        return cls(
            np.where(present, ids, 0).astype(np.int32),
            np.minimum(logits, MAX_QUANTUM * DEFAULT_STEP).astype(np.float32),
            num_classes,
            view or GridView.stretch(),
        )


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """Maps of several images as a store keeps them: cheap to move, decoded on demand.

    Attributes:
        entries: uint32 [B, K, H, W], class id in the upper 24 bits, steps in the lower 8.
        step: width of a quantisation step in nats.
        num_classes: C.
        boxes: float64 [B, 4], each map's view box in the image frame.
    """

    entries: NDArray[np.uint32]
    step: float
    num_classes: int
    boxes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> LabelMap:
        class_ids, steps = unpack_entries(self.entries[index])
        x0, y0, x1, y1 = self.boxes[index].tolist()
        view = GridView((x0, y0, x1, y1))
        return LabelMap(class_ids, dequantize(steps, self.step), self.num_classes, view)

    @property
    def class_ids(self) -> NDArray[np.int32]:
        """[B, K, H, W] class ids in rank order; 0 where an entry is absent."""
        return unpack_entries(self.entries)[0]

    @property
    def logits(self) -> NDArray[np.float32]:
        """[B, K, H, W] tail-relative logits; 0 where an entry is absent."""
        return dequantize(unpack_entries(self.entries)[1], self.step)
