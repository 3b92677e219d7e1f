import contextlib
import multiprocessing
import os
import resource
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenlabel.storage.errors import CorruptStoreError, PublishError, StoreFormatError
from tokenlabel.storage.folder import StoreFolder

FORK = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def files(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def scratch_file(root: Path, pid: int, host: str | None = None) -> Path:
    path = root / ".tmp" / f"{host or socket.gethostname()}@{pid}-{secrets.token_hex(8)}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half an obj")
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# Publication


def test_the_first_writer_wins_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path / "new")
    assert not folder.exists("shards/0.json")
    assert folder.publish("shards/0.json", b"first")
    assert folder.exists("shards/0.json")
    assert not folder.publish("shards/0.json", b"second")
    assert folder.read("shards/0.json") == b"first"
    assert files(tmp_path / "new") == ["shards/0.json"]
    assert list(folder.names("shards")) == ["shards/0.json"]


def test_names_lists_objects_and_nothing_else(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path)
    folder.publish("a/one", b"")
    folder.publish("a/two", b"")
    folder.publish("a/below/three", b"")
    assert sorted(folder.names("a")) == ["a/one", "a/two"]
    assert list(folder.names("missing")) == []
    assert list(folder.names("a/one")) == []


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("shards/7.json", "folder"):
        with pytest.raises(CorruptStoreError, match=str(tmp_path / name)):
            StoreFolder(tmp_path).read(name)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a/", "a\0b"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = StoreFolder(tmp_path / "s")
    for use in (folder.path, folder.read, folder.exists, lambda n: folder.publish(n, b"")):
        with pytest.raises(StoreFormatError, match="no name of an object"):
            use(name)
    assert files(tmp_path) == []


@FORK
def test_of_many_processes_exactly_one_publishes_a_name(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers, names = 6, [f"shards/{n}" for n in range(25)]
    start = context.Barrier(workers)
    results: Any = context.Queue()

    def race(worker: int) -> None:
        folder = StoreFolder(tmp_path / "s")
        start.wait(30)
        won = []
        for name in names:
            won.append(folder.publish(name, bytes([worker]) * 1000))
            folder.clean()  # a run that ends cleans, while others are at work
        results.put((worker, won))

    processes = [context.Process(target=race, args=(worker,)) for worker in range(workers)]
    for process in processes:
        process.start()
    try:
        answers = dict(results.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    for place, name in enumerate(names):
        winners = [worker for worker, won in answers.items() if won[place]]
        assert len(winners) == 1
        assert (tmp_path / "s" / name).read_bytes() == bytes(winners) * 1000
    assert files(tmp_path / "s") == sorted(names)


def test_cleaning_by_another_run_never_fails_a_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = StoreFolder(tmp_path), StoreFolder(tmp_path)
    make_folder, link = Path.mkdir, os.link
    interruptions = 0

    def mkdir_then_clean(path: Path, *args: Any, **options: Any) -> None:
        nonlocal interruptions
        make_folder(path, *args, **options)
        if path.name == ".tmp" and interruptions < 2:
            interruptions += 1
            other.clean()  # takes the empty scratch folder away

    def lose_then_link(source: Path, target: Path) -> None:
        nonlocal interruptions
        if interruptions < 4:
            interruptions += 1
            Path(source).unlink()
        link(source, target)

    monkeypatch.setattr(Path, "mkdir", mkdir_then_clean)
    monkeypatch.setattr("os.link", lose_then_link)
    folder.prepare()
    assert folder.publish("a/b", b"data")
    assert interruptions == 4
    assert folder.read("a/b") == b"data"


# Leftovers


def test_leftovers_of_the_dead_are_cleaned_those_of_the_living_kept(tmp_path: Path) -> None:
    dead = scratch_file(tmp_path, dead_pid())
    alive = scratch_file(tmp_path, os.getpid())
    parent = scratch_file(tmp_path, os.getppid())
    elsewhere = scratch_file(tmp_path, dead_pid(), host="another-machine")
    strangers = [tmp_path / ".tmp" / name for name in ("notes", f"{socket.gethostname()}@x", "@")]
    for stranger in strangers:
        stranger.touch()
    StoreFolder(tmp_path).clean()
    assert not dead.exists()
    for kept in (alive, parent, elsewhere, *strangers):
        assert kept.exists()


@FORK
def test_a_killed_process_leaves_no_object_and_its_leftovers_are_cleaned(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    reached, sender = context.Pipe(duplex=False)

    def stop_before_link() -> None:
        def stop(*_: Any) -> None:
            sender.send("about to link")
            os.kill(os.getpid(), 9)

        pytest.MonkeyPatch().setattr("os.link", stop)  # in this process only
        StoreFolder(tmp_path).publish("shards/0.json", b"data")

    process = context.Process(target=stop_before_link)
    process.start()
    process.join(30)
    assert reached.poll(0)
    (leftover,) = files(tmp_path)
    assert leftover.startswith(".tmp/")
    StoreFolder(tmp_path).clean()
    assert files(tmp_path) == []
    assert not (tmp_path / ".tmp").exists()
    StoreFolder(tmp_path).clean()


# Places that cannot be written


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[bool]:
    """A tiny file system of its own; False where this user may not mount."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tokenlabel-test", str(path)]
    try:
        allowed = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """A place with room for 64 kB; without a mount, for no larger file than that."""
    with mounted(path, "size=64k") as is_mounted, contextlib.ExitStack() as undo:
        if not is_mounted:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
            undo.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        yield


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    with mounted(path, "ro") as is_mounted:
        if not is_mounted:
            path.chmod(0o500)
        yield
        if not is_mounted:
            path.chmod(0o700)


def one_line(caught: pytest.ExceptionInfo[PublishError], path: Path) -> str:
    message = str(caught.value)
    assert message.startswith(f"{path}: cannot write")
    assert "\n" not in message
    return message


def test_a_full_disk_is_one_clear_error_and_nothing_partial(tmp_path: Path) -> None:
    with full_disk(tmp_path):
        folder = StoreFolder(tmp_path)
        assert folder.publish("shards/0", b"x" * 20_000)
        with pytest.raises(PublishError) as caught:
            folder.publish("shards/1", b"x" * 100_000)
        assert "run the same command again" in one_line(caught, tmp_path / "shards/1")
        assert files(tmp_path) == ["shards/0"]
        assert not folder.exists("shards/1")
        assert folder.read("shards/0") == b"x" * 20_000
        assert folder.publish("shards/2", b"there is room for this"), "it goes on once there is"


def test_a_read_only_target_is_one_clear_error(tmp_path: Path) -> None:
    with read_only(tmp_path):
        folder = StoreFolder(tmp_path)
        with pytest.raises(PublishError) as caught:
            folder.prepare()
        assert "choose another folder" in one_line(caught, tmp_path)
        with pytest.raises(PublishError) as caught:
            StoreFolder(tmp_path / "below").prepare()
        one_line(caught, tmp_path / "below")
        with pytest.raises(PublishError) as caught:
            folder.publish("shards/0", b"data")
        one_line(caught, tmp_path / "shards/0")
        folder.clean()
        assert files(tmp_path) == []


def test_a_file_in_the_folders_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    folder = StoreFolder(tmp_path / "out")
    with pytest.raises(PublishError) as caught:
        folder.prepare()
    one_line(caught, tmp_path / "out")
    with pytest.raises(PublishError) as caught:
        folder.publish("manifest.json", b"{}")
    one_line(caught, tmp_path / "out/manifest.json")


def test_preparing_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path / "a/b")
    folder.prepare()
    folder.clean()
    assert list((tmp_path / "a/b").iterdir()) == []
