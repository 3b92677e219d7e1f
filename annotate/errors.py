"""Errors of annotation; see `tokenlabel.storage.errors` for the base."""

from ..storage.errors import TokenLabelError

__all__ = ["AnnotatorError", "InterruptedRunError", "ShardsFailedError"]


class AnnotatorError(TokenLabelError, ValueError):
    """An annotator that cannot be built, or does not do densely what it does pooled."""


class ShardsFailedError(TokenLabelError, RuntimeError):
    """A run that ended with shards it could not finish; the others are committed."""


class InterruptedRunError(TokenLabelError, RuntimeError):
    """A run that was stopped from outside; what it committed is kept."""

    exit_status = 130
