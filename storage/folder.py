"""The folder a store lives in: reads whole objects, publishes new ones create-only.

An object appears under its name complete or not at all, and the first writer wins, whoever else
is writing: another worker, another run, a worker that outlived its killed driver. Nothing is
ever overwritten. This is the only module that writes into a store.
"""

import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import CorruptStoreError, PublishError, StoreFormatError

__all__ = ["StoreFolder"]

_SCRATCH = ".tmp"
_ATTEMPTS = 10
_SCRATCH_NAME = re.compile(r"(.*)@([0-9]{1,7})-[0-9a-f]{16}", re.DOTALL)


class StoreFolder:
    """A local folder of immutable objects named by posix paths below it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def exists(self, name: str) -> bool:
        """Whether an object of this name has been published."""
        return self.path(name).is_file()

    def path(self, name: str) -> Path:
        """Where the object lies; names that would leave the folder are refused."""
        parts = name.split("/")
        if "\0" in name or any(part in {"", ".", ".."} for part in parts):
            raise StoreFormatError(f"{self.root}: {name!r} is no name of an object in a store")
        return self.root.joinpath(*parts)

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            CorruptStoreError: it is missing or cannot be read.
        """
        path = self.path(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise CorruptStoreError(f"{path}: {_reason(error)}") from error

    def names(self, folder: str) -> Iterator[str]:
        """Names of the objects directly below a folder, unsorted; none where it is missing."""
        missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with missing, os.scandir(self.path(folder)) as entries:
            for entry in entries:
                if entry.is_file():
                    yield f"{folder}/{entry.name}"

    def publish(self, name: str, data: bytes) -> bool:
        """Make an object appear, whole and durable, unless one of that name exists.

        The bytes go to a scratch file and to disk first; `link` then fails where the name is
        taken, which `rename` would not.

        Returns:
            True if these bytes are now the object, False if an earlier writer's are.

        Raises:
            PublishError: the folder cannot be written (disk full, read-only, no permission).
        """
        target = self.path(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_ATTEMPTS):
                scratch = self._write_scratch(data)
                try:
                    os.link(scratch, target)
                except FileExistsError:
                    return False
                except FileNotFoundError:
                    continue  # another run's cleaning took our scratch file for a dead one's
                finally:
                    scratch.unlink(missing_ok=True)
                _sync_folder(target.parent)
                return True
        except OSError as error:
            raise PublishError(
                f"{target}: cannot write: {_reason(error)}. What is committed is kept; free or "
                "unlock the place and run the same command again"
            ) from error
        raise PublishError(f"{target}: scratch files keep disappearing from {self.root / _SCRATCH}")

    def prepare(self) -> None:
        """Make the folder and see that it can be written, before any work is spent on it.

        Raises:
            PublishError: it cannot.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._write_scratch(b"").unlink()
            self.clean()
        except OSError as error:
            raise PublishError(
                f"{self.root}: cannot write here: {_reason(error)}; choose another folder"
            ) from error

    def clean(self) -> None:
        """Remove scratch files that a killed process of this host left behind, where it can."""
        scratch = self.root / _SCRATCH
        host = socket.gethostname()
        with contextlib.suppress(OSError), os.scandir(scratch) as entries:
            for entry in entries:
                owner = _SCRATCH_NAME.fullmatch(entry.name)
                if owner and owner[1] == host and not _is_running(int(owner[2])):
                    Path(entry.path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            scratch.rmdir()

    def _write_scratch(self, data: bytes) -> Path:
        folder = self.root / _SCRATCH
        path = folder / f"{socket.gethostname()}@{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with _created(path) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return path


def _created(path: Path) -> BinaryIO:
    """A new file, its folder made where needed; another run's cleaning may be taking that away."""
    for _ in range(_ATTEMPTS):
        path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return path.open("xb")
    raise FileNotFoundError(errno.ENOENT, f"{path.parent} keeps disappearing")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
