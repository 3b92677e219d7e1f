"""The Zarr array of a store, one shard at a time.

Writing goes through Zarr itself: a shard is encoded into memory and its bytes are published as
the object Zarr would have written. Reading single samples does not, because indexing a Zarr
array costs milliseconds a sample: `ShardFile` reads the shard's own index and decodes one chunk.
It is a shorter way to the same bytes, and a test holds it equal to Zarr's answer.
"""

import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from .errors import CorruptStoreError
from .layout import MAPS, shard_object
from .manifest import Settings

__all__ = ["ShardFile", "encode_shard", "maps_metadata"]

_ABSENT = np.iinfo(np.uint64).max
_CRC_BYTES = 4


def _array_in_memory(settings: Settings) -> tuple[MemoryStore, zarr.Array[Any]]:
    memory = MemoryStore()
    cell = (settings.top_k, *settings.grid)
    array = zarr.create_group(memory).create_array(
        "entries",
        shape=(settings.rows, *cell),
        chunks=(1, *cell),
        shards=(settings.shard_size, *cell),
        dtype="uint32",
        compressors=[
            BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=4),
            Crc32cCodec(),
        ],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},  # one folder, not four a shard
        dimension_names=("sample", "rank", "row", "column"),
        # A failed image is a chunk of zeros that is there: an absent chunk is damage.
        config={"write_empty_chunks": True},
    )
    return memory, array


def _stored(memory: MemoryStore, name: str) -> bytes:
    buffer = sync(memory.get(name, default_buffer_prototype()))
    if buffer is None:
        raise CorruptStoreError(f"Zarr wrote no object {name!r}")
    return buffer.to_bytes()


def maps_metadata(settings: Settings) -> dict[str, bytes]:
    """Zarr's own metadata objects, by name: with them `zarr.open` reads the store."""
    memory, _ = _array_in_memory(settings)
    return {f"{MAPS}/{name}": _stored(memory, name) for name in ("zarr.json", "entries/zarr.json")}


def encode_shard(settings: Settings, shard: int, entries: NDArray[np.uint32]) -> bytes:
    """The bytes of the shard object that holds entries [rows of the shard, K, H, W]."""
    memory, array = _array_in_memory(settings)
    rows = settings.shard_rows(shard)
    array[rows.start : rows.stop] = entries
    return _stored(memory, shard_object(shard).removeprefix(f"{MAPS}/"))


class ShardFile:
    """One shard object, read sample by sample with `pread`; safe to share between threads.

    Args:
        path: the object.
        settings: of the store.
        shard: its number.
        size: bytes that were committed, where they were.

    Raises:
        CorruptStoreError: it is missing, or its index is damaged.
    """

    def __init__(self, path: Path, settings: Settings, shard: int, size: int | None = None) -> None:
        self._path = path
        self._shape = (settings.top_k, *settings.grid)
        self._rows = settings.shard_rows(shard)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CorruptStoreError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        self._size = os.fstat(self._descriptor).st_size
        if size not in {None, self._size}:
            raise CorruptStoreError(f"{path}: {self._size} bytes, {size} were committed")
        length = settings.shard_size * 16 + _CRC_BYTES
        index = self._pread(length, self._size - length, "its index")
        # (offset, length) of each chunk, both uint64 [shard_size]
        self._index = np.frombuffer(self._checked(index, "its index"), dtype="<u8").reshape(-1, 2)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def entries(self, row: int) -> NDArray[np.uint32]:
        """Entries [K, H, W] of a row, which is numbered in the whole store.

        Raises:
            CorruptStoreError: the chunk is missing, cut short or changed.
        """
        what = f"the chunk of row {row}"
        offset, length = self._index[row - self._rows.start].tolist()
        if offset == _ABSENT:
            raise CorruptStoreError(f"{self._path}: {what} is missing")
        chunk = self._checked(self._pread(length, offset, what), what)
        expected = int(np.prod(self._shape)) * 4
        # blosc believes its header; a wrong size must not become a wild allocation
        if len(chunk) < 16 or int.from_bytes(chunk[4:8], "little") != expected:
            raise CorruptStoreError(f"{self._path}: {what} does not hold {expected} bytes")
        try:
            raw = blosc.decompress(chunk)
        except (RuntimeError, ValueError) as error:
            raise CorruptStoreError(f"{self._path}: {what} cannot be decoded: {error}") from error
        return np.frombuffer(raw, dtype="<u4").reshape(self._shape)

    def _pread(self, length: int, offset: int, what: str) -> bytes:
        if offset < 0 or offset + length > self._size:
            raise CorruptStoreError(
                f"{self._path}: {what} lies beyond the end of the file ({self._size} bytes)"
            )
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise CorruptStoreError(f"{self._path}: cannot read {what}: {reason}") from error

    def _checked(self, data: bytes, what: str) -> bytes:
        body, stored = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if len(stored) < _CRC_BYTES or google_crc32c.value(body) != int.from_bytes(
            stored, "little"
        ):
            raise CorruptStoreError(f"{self._path}: the checksum of {what} does not match")
        return body
