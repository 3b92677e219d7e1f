"""What a store's objects are written in: canonical JSON, sealed JSON, references by hash.

Sealed JSON carries a checksum of everything else in it, so that no reader believes a changed one.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Json", "ObjectRef", "canonical_json", "seal", "unseal"]

Json = dict[str, Any]

_CHECKSUM = "checksum"


def canonical_json(value: object) -> bytes:
    """JSON bytes that depend on the value alone."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    # A file name that is no UTF-8 holds lone surrogates; JSON escapes them the way Python does.
    return text.encode(errors="backslashreplace") + b"\n"


def seal(content: Json) -> bytes:
    """Canonical JSON of an object, with a checksum over it added."""
    checksum = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json({**content, _CHECKSUM: checksum})


def unseal(data: bytes) -> Json:
    """The object that `seal` wrote.

    Raises:
        ValueError: the bytes differ from what was written, be it in one bit.
    """
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(found, dict) or _CHECKSUM not in found:
        raise ValueError("no JSON object with a checksum")
    del found[_CHECKSUM]
    if seal(found) != data:
        raise ValueError("the checksum does not match, the file was changed")
    return found


@dataclass(frozen=True)
class ObjectRef:
    """A published object as others name it: name, SHA-256 and size in bytes."""

    name: str
    sha256: str
    size: int

    @classmethod
    def of(cls, name: str, data: bytes) -> Self:
        """Describe an object."""
        return cls(name, hashlib.sha256(data).hexdigest(), len(data))
