"""From an annotator's scores to what a store keeps of them, computed on the device.

The full distribution over all classes never leaves the device: of each cell the top-k scores,
the mass beside them and two figures for fidelity do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage.encoding import (
    dequantize,
    pack_entries,
    quantize,
    tail_relative_logits,
)
from ..storage.label_map import affine_probabilities
from .annotator import DenseAnnotator

__all__ = ["BatchScores", "EncodedBatch", "encode", "score"]

_CHUNK_SCORES = 1 << 26
"""Scores held at once while ranking: 256 MiB of float32."""


@dataclass(frozen=True)
class BatchScores:
    """What is kept of a batch of B images, on the device they were computed on.

    Attributes:
        class_ids: int64 [B, K, H, W], descending by score.
        log_probabilities: float32 [B, K, H, W], theirs under the softmax over all C classes.
        log_rest: float32 [B, H, W], log of the mass of the other C - K classes.
        negative_entropy: float32 [B, H, W], sum of p ln p over all C classes.
        pooled_ids: int64 [B, K], the annotator's own top classes for the whole image.
        pooled_probabilities: float32 [B, K].
    """

    class_ids: Tensor
    log_probabilities: Tensor
    log_rest: Tensor
    negative_entropy: Tensor
    pooled_ids: Tensor
    pooled_probabilities: Tensor

    def to_host(self) -> tuple["BatchScores", torch.cuda.Event | None]:
        """Start copying to host memory, and say when the copy is there.

        Returns:
            The scores on the host and the event to wait for; None where there is nothing to
            wait for.
        """
        if not self.class_ids.is_cuda:
            return BatchScores(*(tensor.cpu() for tensor in vars(self).values())), None
        host = [
            torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in vars(self).values()
        ]
        copied = torch.cuda.Event()
        copied.record()
        return BatchScores(*host), copied


@torch.inference_mode()
def score(annotator: DenseAnnotator, images: Tensor, top_k: int) -> BatchScores:
    """Run an annotator densely and rank its classes.

    Args:
        annotator: on the device of `images`.
        images: normalised, [B, 3, height, width].
        top_k: K, smaller than C.
    """
    network = annotator.network
    features = network.features(images)
    cells = network.locations(features)
    batch, height, width = cells.shape[:3]
    vectors = cells.flatten(0, 2)
    # The chunk is a function of the settings alone, so that results are, too.
    chunk = max(1, _CHUNK_SCORES // annotator.num_classes)
    parts = [_rank(network.classify(part), top_k) for part in vectors.split(chunk)]
    ids, log_p, log_rest, negative_entropy = (
        torch.cat(column).unflatten(0, (batch, height, width))
        for column in zip(*parts, strict=True)
    )
    pooled_log_p, pooled_ids = network.pooled(features).float().log_softmax(1).topk(top_k)
    return BatchScores(
        ids.movedim(-1, 1),
        log_p.movedim(-1, 1),
        log_rest,
        negative_entropy,
        pooled_ids,
        pooled_log_p.exp(),
    )


def _rank(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [n, C] -> ids [n, K], log p [n, K], log rest [n], sum p ln p [n]."""
    log_p = scores.float().log_softmax(dim=1)
    top, ids = log_p.topk(top_k, dim=1)
    # The rest from the unlisted classes themselves: 1 - sum of p would cancel where it is small.
    rest = log_p.scatter(1, ids, float("-inf")).logsumexp(dim=1)
    negative_entropy = (log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=1)
    return ids, top, rest, negative_entropy


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as a store keeps it.

    Attributes:
        entries: uint32 [B, K, H, W].
        kl_quantization: float32 [B], nats, see `tokenlabel.storage.records.RowTable`.
        kl_full: float32 [B], nats, likewise.
        pooled_ids: int32 [B, K].
        pooled_probabilities: float32 [B, K].
    """

    entries: NDArray[np.uint32]
    kl_quantization: NDArray[np.float32]
    kl_full: NDArray[np.float32]
    pooled_ids: NDArray[np.int32]
    pooled_probabilities: NDArray[np.float32]


def encode(scores: BatchScores, num_classes: int, step: float) -> EncodedBatch:
    """Quantise and pack a batch, and measure what that costs.

    Both figures are Kullback-Leibler divergences to the decoded distribution q, mean over cells:
    from the annotator's full softmax p, and from its top-k with the rest spread evenly, which is
    all that a store of this k could keep.
    """
    log_p = scores.log_probabilities.numpy().astype(np.float64)  # [B, K, H, W]
    log_rest = scores.log_rest.numpy().astype(np.float64)  # [B, H, W]
    top_k = log_p.shape[1]
    steps = quantize(log_p, log_rest, num_classes, step)
    base, excess = affine_probabilities(dequantize(steps, step), num_classes)
    log_base = np.log(base)
    log_q = np.log(base[:, None] + excess)  # of the listed classes
    p = np.exp(log_p)
    cross = (p * log_q).sum(axis=1) + np.exp(log_rest) * log_base  # sum over all C of p ln q
    full = scores.negative_entropy.numpy().astype(np.float64) - cross
    unrounded = tail_relative_logits(log_p, log_rest, num_classes)
    # +inf where nothing is left for the tail; exp(700) is close to the end of float64
    kept_base, kept_excess = affine_probabilities(np.minimum(unrounded, 700), num_classes)
    kept = kept_base[:, None] + kept_excess
    rounding = (kept * (np.log(kept) - log_q)).sum(axis=1) + (num_classes - top_k) * (
        kept_base * (np.log(kept_base) - log_base)
    )
    return EncodedBatch(
        pack_entries(scores.class_ids.numpy(), steps),
        rounding.mean(axis=(1, 2)).astype(np.float32),
        full.mean(axis=(1, 2)).astype(np.float32),
        scores.pooled_ids.numpy().astype(np.int32),
        scores.pooled_probabilities.numpy(),
    )
