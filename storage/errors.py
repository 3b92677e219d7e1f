"""Errors of tokenlabel: one base class, refinements that also are the builtin they refine.

A message holds what was expected, what was found, which file or key, and what to do about it.
The command line prints it as one line; everything else that escapes is a bug.
"""

__all__ = [
    "CorruptStoreError",
    "IncompleteStoreError",
    "InvalidLabelError",
    "MissingLabelError",
    "PublishError",
    "SettingsError",
    "StoreFormatError",
    "TokenLabelError",
]


class TokenLabelError(Exception):
    """Base of every error that tokenlabel raises on purpose.

    Attributes:
        exit_status: of the command, where it ends by this error.
    """

    exit_status = 1


class InvalidLabelError(TokenLabelError, ValueError):
    """Values that cannot be a label map: wrong shapes, ids or scores out of range."""


class StoreFormatError(TokenLabelError, ValueError):
    """Not a label store, or a store of a version this program does not read."""


class IncompleteStoreError(TokenLabelError, RuntimeError):
    """A store, or a row of it, whose shards are not all committed yet."""


class MissingLabelError(TokenLabelError, KeyError):
    """A key or an index that has no label: unknown, or its image could not be annotated."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, as if it were the key.
        return str(self.args[0])


class CorruptStoreError(TokenLabelError, OSError):
    """Bytes in a store that are not what was committed."""


class PublishError(TokenLabelError, OSError):
    """A store that cannot be written: disk full, read-only, no permission."""


class SettingsError(TokenLabelError, ValueError):
    """Settings that contradict each other, the input, or the store they are to continue."""
