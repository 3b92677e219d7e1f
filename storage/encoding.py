"""How the scores of a cell become 32-bit entries, and back. Pure numpy, no files.

A cell lists up to K classes in rank order and spreads the mass it does not list evenly over the
other classes. A listed class is stored by its **tail-relative logit**, how far its log
probability lies above that of an unlisted class:

    c = ln p - ln(residual / (C - listed))

An entry is a uint32: class id in the upper 24 bits, the logit in steps in the lower 8. Decoding
needs nothing else, because probabilities follow exactly from the logits alone:

    Z = C + sum expm1(c),   p(unlisted) = 1 / Z,   p(listed) = exp(c) / Z

so c = 0 means "like any unlisted class", and an entry that rounds to 0 is an absent one.
"""

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidLabelError

__all__ = [
    "DEFAULT_STEP",
    "MAX_CLASSES",
    "MAX_QUANTUM",
    "dequantize",
    "pack_entries",
    "quantize",
    "tail_relative_logits",
    "unpack_entries",
]

DEFAULT_STEP = 0.2
"""Width of a quantisation step in nats."""

MAX_QUANTUM = 255
"""The largest stored step; a logit beyond it is clamped."""

MAX_CLASSES = 1 << 24
"""Class ids have 24 bits."""


def tail_relative_logits(
    log_scores: NDArray[np.floating],
    log_rest: NDArray[np.floating],
    num_classes: int,
    *,
    smallest: float = 0.0,
) -> NDArray[np.float64]:
    """Turn ranked log scores and the log of the mass beside them into tail-relative logits.

    Entries that do not stand out from the tail (logit at most `smallest`) are dropped, from the
    last rank on, and the mass they held joins the tail of the entries that stay. The first entry
    always stays.

    Args:
        log_scores: [..., K, H, W], natural logs in descending order along K, up to a constant
            for each cell (logits will do).
        log_rest: [..., H, W], log-sum-exp of the C - K classes that are not listed, up to the
            same constant.
        num_classes: C, larger than K.
        smallest: logits at or below it are dropped.

    Returns:
        [..., K, H, W] logits >= 0; 0 where dropped, +inf where the tail has no mass at all.
    """
    ranks = log_scores.shape[-3]
    if not 1 <= ranks < num_classes:
        raise InvalidLabelError(
            f"a cell of {num_classes} classes can list 1 to {num_classes - 1} of them, got {ranks}"
        )
    scores = np.moveaxis(log_scores.astype(np.float64), -3, 0)  # [K, ..., H, W]
    tail = log_rest.astype(np.float64)
    logits = np.zeros_like(scores)
    undecided = np.ones(tail.shape, dtype=bool)
    with np.errstate(invalid="ignore"):  # -inf - -inf: an entry without mass before an empty tail
        for listed in range(ranks, 0, -1):
            relative = scores[:listed] - (tail - np.log(num_classes - listed))
            keep = undecided & ((relative[-1] > smallest) | (listed == 1))
            logits[:listed, keep] = np.nan_to_num(relative[:, keep], nan=0.0, posinf=np.inf)
            undecided &= ~keep
            tail = np.logaddexp(tail, scores[listed - 1])
    return np.moveaxis(np.maximum(logits, 0.0), 0, -3)


def quantize(
    log_scores: NDArray[np.floating],
    log_rest: NDArray[np.floating],
    num_classes: int,
    step: float = DEFAULT_STEP,
) -> NDArray[np.uint8]:
    """Quantise ranked log scores; see `tail_relative_logits` for shapes.

    Returns:
        [..., K, H, W] uint8 steps: 0 is an absent entry, and rank 0 is never absent.
    """
    # Half a step would round to zero: dropping it first lets the others absorb its mass.
    logits = tail_relative_logits(log_scores, log_rest, num_classes, smallest=step / 2)
    steps = np.rint(np.minimum(logits / step, MAX_QUANTUM)).astype(np.uint8)
    np.maximum(steps[..., 0, :, :], 1, out=steps[..., 0, :, :])
    return steps


def dequantize(steps: NDArray[np.uint8], step: float) -> NDArray[np.float32]:
    """The tail-relative logits that stored steps stand for, same shape."""
    return steps.astype(np.float32) * np.float32(step)


def pack_entries(class_ids: NDArray[np.integer], steps: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Pack ids and steps of equal shape into entries; absent entries become plain 0."""
    if class_ids.size and not 0 <= int(class_ids.min()) <= int(class_ids.max()) < MAX_CLASSES:
        raise InvalidLabelError(
            f"class ids must lie in 0 to {MAX_CLASSES - 1}, "
            f"got {int(class_ids.min())} to {int(class_ids.max())}"
        )
    entries = (class_ids.astype(np.uint32) << np.uint32(8)) | steps
    return np.where(steps > 0, entries, np.uint32(0))


def unpack_entries(
    entries: NDArray[np.uint32],
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Class ids (int32) and steps (uint8) of entries, both of the entries' shape."""
    return (entries >> np.uint32(8)).astype(np.int32), (entries & np.uint32(0xFF)).astype(np.uint8)
