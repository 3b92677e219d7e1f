"""The token labelling loss: soft cross-entropy against sparse targets, never made dense.

A class token is a token too: both parts of the loss are the same cross-entropy.
"""

from typing import Self

import torch
from torch import Tensor, nn

from ..storage.errors import SettingsError
from .errors import InvalidTargetsError
from .targets import TokenTargets

__all__ = ["TokenLabelLoss", "token_cross_entropy"]

# (class weight, dense weight) as the two reference pipelines train.
_PRESETS = {"lvvit": (1.0, 1.0), "volo": (1.0, 0.5)}


def token_cross_entropy(logits: Tensor, targets: TokenTargets) -> Tensor:
    """Soft cross-entropy of every token, times the token's weight, summed and divided by B * N.

    A token of weight 0 adds nothing (its uniform target says nothing) and one that is half known
    counts half. The divisor is the number of tokens, not the sum of weights, so that the mean over
    equal parts of a batch is the loss of the batch, also across ranks.

    Args:
        logits: [B, N, C] of any floating dtype; computed in float32 at least.
        targets: of B x N tokens, on the same device.

    Returns:
        A scalar, differentiable in `logits`.

    Raises:
        InvalidTargetsError: the shapes differ, or the number of classes does.
    """
    if logits.ndim != 3 or logits.shape[:2] != targets.base.shape:
        raise InvalidTargetsError(
            f"expected logits [B, N, C] with B, N = {tuple(targets.base.shape)} as the targets "
            f"have, got {tuple(logits.shape)}: is the targets' token_grid the "
            "student's, and the student in training mode?"
        )
    targets.check_num_classes(logits.shape[-1])
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    listed = (targets.excess * log_p.gather(-1, targets.class_ids.long())).sum(-1)
    cross_entropy = -listed - targets.base * log_p.sum(-1)
    return (targets.weight * cross_entropy).mean()


class TokenLabelLoss(nn.Module):
    """`cls_weight` times the loss of the class token plus `dense_weight` times that of the tokens.

    Args:
        cls_weight: weight of the class token's cross-entropy.
        dense_weight: weight of the tokens' cross-entropy.
    """

    def __init__(self, cls_weight: float = 1.0, dense_weight: float = 1.0) -> None:
        super().__init__()
        self.cls_weight = cls_weight
        self.dense_weight = dense_weight

    @classmethod
    def preset(cls, name: str) -> Self:
        """The weights of a published recipe: "lvvit" (1.0, 1.0) or "volo" (1.0, 0.5).

        Raises:
            SettingsError: no such preset.
        """
        if name not in _PRESETS:
            raise SettingsError(f"expected a preset of {sorted(_PRESETS)}, got {name!r}")
        return cls(*_PRESETS[name])

    def forward(self, outputs: tuple[Tensor, Tensor], targets: TokenTargets) -> Tensor:
        """The weighted sum of `parts`, a scalar; arguments and errors are theirs."""
        class_loss, token_loss = self.parts(outputs, targets)
        return self.cls_weight * class_loss + self.dense_weight * token_loss

    def parts(self, outputs: tuple[Tensor, Tensor], targets: TokenTargets) -> tuple[Tensor, Tensor]:
        """The unweighted losses of the class token and of the tokens, for logs.

        Args:
            outputs: class logits [B, C] and token logits [B, N, C], as a student in training
                returns them.
            targets: of the B x N tokens, with a `class_target`.

        Raises:
            InvalidTargetsError: no class target, or see `token_cross_entropy`.
        """
        class_logits, token_logits = outputs
        if targets.class_target is None:
            raise InvalidTargetsError("expected targets with a class_target, as replay makes them")
        return (
            token_cross_entropy(class_logits.unsqueeze(1), targets.class_target),
            token_cross_entropy(token_logits, targets),
        )
