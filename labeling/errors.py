"""Errors of replay and training; see `tokenlabel.storage.errors` for what a message holds."""

from ..storage.errors import TokenLabelError

__all__ = [
    "InvalidTargetsError",
    "MissingSamplesError",
    "ReplayError",
    "UnreadableImageError",
    "UnsupportedModelError",
    "UnsupportedTransformError",
]


class InvalidTargetsError(TokenLabelError, ValueError):
    """Token targets whose tensors contradict each other or the logits they are compared with."""


class MissingSamplesError(TokenLabelError, ValueError):
    """Images without a label, or labels without an image."""


class ReplayError(TokenLabelError, ValueError):
    """Maps, matrices or settings that cannot be replayed."""


class UnreadableImageError(TokenLabelError, OSError):
    """An image to train on that cannot be decoded."""


class UnsupportedTransformError(TokenLabelError, TypeError):
    """A transform that moves pixels in a way label maps cannot follow."""


class UnsupportedModelError(TokenLabelError, TypeError):
    """A network that cannot be given a token head."""
