"""Runs are killed with SIGKILL at many moments; finished, every store is the same to the byte."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenlabel.annotate import annotate
from tokenlabel.storage import open_store, verify

Digest = Callable[[Path], dict[str, str]]

# 20 images in 7 shards of three objects each, beside four objects laid out first
SETTINGS: dict[str, Any] = {
    "model": "test_efficientnet",
    "pretrained": False,
    "img_size": 64,
    "batch_size": 2,
    "shard_size": 3,
}
OBJECTS = 4 + 7 * 3


@pytest.fixture(scope="module")
def undisturbed(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, tree_digest: Digest
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "labels"
    annotate(photos, out, workers=0, **SETTINGS)
    digest = tree_digest(out)
    assert len(digest) == OBJECTS
    return digest


def wait_for_objects(out: Path, count: int, alive: Callable[[], bool]) -> None:
    """Until a store holds so many objects, scratch files included."""
    while alive():
        try:
            found = sum(len(files) for _, _, files in os.walk(out))
        except FileNotFoundError:
            continue
        if found >= count:
            return


def check_resumes(out: Path, photos: Path, digest: dict[str, str], tree_digest: Digest) -> None:
    annotate(photos, out, workers=0, **SETTINGS)
    assert tree_digest(out) == digest
    assert list(verify(out)) == []
    assert len(open_store(out)) == 20


@pytest.mark.parametrize("seed", range(12))
def test_killed_run_resumes_to_identical_store(
    seed: int, photos: Path, tmp_path: Path, undisturbed: dict[str, str], tree_digest: Digest
) -> None:
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenlabel.annotate"])
    out = tmp_path / "labels"
    for _ in range(2):  # killed, continued, killed again
        run = context.Process(
            target=annotate, args=(photos, out), kwargs={"workers": 0, **SETTINGS}
        )
        run.start()
        wait_for_objects(out, chance.randint(1, OBJECTS), run.is_alive)
        time.sleep(chance.choice([0, 0, 0.002, 0.01, 0.05]))
        run.kill()
        run.join()
        if (out / "manifest.json").exists():
            # Nothing partial passes as whole, at any moment.
            store = open_store(out, allow_partial=True)
            assert store.read(range(len(store))).entries[:, 0].all()
    check_resumes(out, photos, undisturbed, tree_digest)


@pytest.mark.parametrize("seed", range(3))
def test_killed_ray_run_resumes_while_its_workers_live_on(
    seed: int, photos: Path, tmp_path: Path, undisturbed: dict[str, str], tree_digest: Digest
) -> None:
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    out = tmp_path / "labels"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in SETTINGS.items()
        if name != "pretrained"
    ]
    command = [sys.executable, "-m", "tokenlabel.cli", "annotate", str(photos), str(out)]
    run = subprocess.Popen(
        [*command, "--no-pretrained", "--workers=2", *options], stderr=subprocess.DEVNULL
    )
    wait_for_objects(out, chance.randint(5, OBJECTS - 3), lambda: run.poll() is None)
    time.sleep(chance.choice([0, 0.01]))
    run.send_signal(signal.SIGKILL)
    run.wait()
    check_resumes(out, photos, undisturbed, tree_digest)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_says_what_is_kept(
    sent: signal.Signals, workers: int, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    command = [sys.executable, "-m", "tokenlabel.cli", "annotate", str(photos), str(out)]
    settings = ["--model=resnet50", "--no-pretrained", "--img-size=224", "--shard-size=1"]
    run = subprocess.Popen(
        [*command, *settings, f"--workers={workers}"], stderr=subprocess.PIPE, text=True
    )
    wait_for_objects(out, 4 + 3 * 3, lambda: run.poll() is None)
    run.send_signal(sent)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "images this run labelled are kept; run the same command again to go on" in said
    assert "Traceback" not in said
    store = open_store(out, allow_partial=True)
    assert 2 <= store.committed_shards < 20  # the last object seen may be a scratch file
