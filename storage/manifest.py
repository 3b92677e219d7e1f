"""The manifest: one JSON object that says what a store is and how it was made.

`settings` is everything the stored values depend on. Its fingerprint is what makes two runs the
same run: a store is continued only by a run whose settings have the same fingerprint.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Self

from .errors import StoreFormatError
from .objects import Json, ObjectRef, canonical_json, seal, unseal

__all__ = ["MANIFEST", "SPEC_VERSION", "Manifest", "Settings", "differences"]

MANIFEST = "manifest.json"
SPEC_VERSION = 1

_READABLE = {"payload": "categorical", "profile": "fast"}


@dataclass(frozen=True)
class Settings:
    """Everything the stored values depend on.

    Attributes:
        annotator: what made the scores (model, hash of the weights, preprocessing, precision).
        num_classes: C.
        levels: one object {"grid": [H, W]} for each map an image has; one today.
        payload: what a cell holds; "categorical" today.
        view: "stretch", "letterbox" or "center".
        top_k: K, the entries a cell keeps.
        step: width of a quantisation step in nats.
        profile: how chunks are compressed.
        batch_size: images the annotator sees together; networks answer slightly differently for
            other sizes.
        shard_size: rows of a shard.
        rows: planned samples.
        plan_sha256: hash of the plan object.
    """

    annotator: Json
    num_classes: int
    levels: list[Json]
    payload: str
    view: str
    top_k: int
    step: float
    profile: str
    batch_size: int
    shard_size: int
    rows: int
    plan_sha256: str

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the one level."""
        height, width = self.levels[0]["grid"]
        return height, width

    @property
    def num_shards(self) -> int:
        """How many shards the rows fill; the last may be partial."""
        return -(-self.rows // self.shard_size)

    def shard_rows(self, shard: int) -> range:
        """The rows of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.rows))

    def fingerprint(self) -> str:
        """Hash of these settings: equal if and only if two runs make the same store."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        settings: what the values depend on.
        class_names: C names, or None.
        source: where the images came from: kind, name, names of its classes.
        created_with: versions of the libraries that made the store, for information.
        objects: the plan and Zarr's metadata, which belong to the store as a whole; filled in by
            the writer that lays the store out.
    """

    settings: Settings
    class_names: list[str] | None
    source: Json
    created_with: dict[str, str]
    objects: tuple[ObjectRef, ...] = ()

    def class_name(self, class_id: int) -> str:
        """The name of a class, or its number where the store has no names."""
        return self.class_names[class_id] if self.class_names else f"class {class_id}"

    def to_bytes(self) -> bytes:
        """The manifest as sealed JSON."""
        head = {"format": "tokenlabel", "spec_version": SPEC_VERSION}
        return seal({**head, "fingerprint": self.settings.fingerprint(), **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Read a manifest, refusing what this program does not understand.

        Args:
            data: the JSON bytes.
            where: the file's name for error messages.

        Raises:
            StoreFormatError: not a manifest, another version, or changed by hand.
        """
        try:
            found = json.loads(data)
            kind, version = found["format"], found["spec_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreFormatError(f"{where}: not the manifest of a label store") from error
        if kind != "tokenlabel":
            raise StoreFormatError(f"{where}: not the manifest of a label store, but of {kind!r}")
        if version != SPEC_VERSION:
            raise StoreFormatError(
                f"{where}: the store has spec version {version}, this program reads version "
                f"{SPEC_VERSION}; install the tokenlabel release that wrote it or a newer one"
            )
        try:
            found = unseal(data)
            settings = Settings(**found["settings"])
            objects = tuple(ObjectRef(**ref) for ref in found["objects"])
            fingerprint = found["fingerprint"]
            for name in ("format", "spec_version", "fingerprint"):
                del found[name]
            manifest = cls(**{**found, "settings": settings, "objects": objects})
            shape = (*settings.grid, settings.num_shards)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise StoreFormatError(f"{where}: damaged manifest: {error}") from error
        if settings.fingerprint() != fingerprint or min(shape) < 1:
            raise StoreFormatError(f"{where}: the settings do not match their fingerprint")
        for name, value in _READABLE.items():
            if getattr(settings, name) != value:
                raise StoreFormatError(
                    f"{where}: the store's {name} is {getattr(settings, name)!r}, this program "
                    f"reads {value!r} only; install a newer tokenlabel release"
                )
        if len(settings.levels) != 1:
            raise StoreFormatError(
                f"{where}: the store has {len(settings.levels)} maps an image, this program "
                "reads 1; install a newer tokenlabel release"
            )
        return manifest


def differences(stored: Json, asked: Json, prefix: str = "") -> Iterator[str]:
    """One line for each setting that differs, such as `batch_size: 8 in the store, now 16`."""
    for name in sorted(stored.keys() | asked.keys()):
        old, new = stored.get(name), asked.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: {old} in the store, now {new}"
