import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tokenlabel.cli import main

SMALL = [
    *("--model", "test_efficientnet", "--no-pretrained", "--img-size", "64"),
    *("--batch-size", "2", "--shard-size", "8", "--workers", "0"),
]


def run(*arguments: object) -> Result:
    """One command; anything but a deliberate exit is a failure of the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def labels(photos: Path, tmp_path: Path) -> Path:
    out = tmp_path / "labels"
    assert run("annotate", photos, out, *SMALL).exit_code == 0
    return out


def test_annotate_says_what_it_did(photos: Path, tmp_path: Path) -> None:
    result = run("annotate", photos, tmp_path / "labels", *SMALL)
    assert result.exit_code == 0
    assert re.search(
        r"20 images labelled in .* s \(.* images/s\): 2x2 cells, top 5 of 1000", result.stdout
    )
    assert "random weights" in result.stderr
    again = run("annotate", photos, tmp_path / "labels", *SMALL)
    assert "20 of 20 images were done before" in again.stdout


def test_failed_images_are_named_and_the_exit_status_tells(tmp_path: Path, photos: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    (images / "bad.jpg").write_text("plain text")
    for _ in range(2):  # a later run over the finished store still tells
        result = run("annotate", images, tmp_path / "labels", *SMALL)
        assert result.exit_code == 3
        assert f"Failed: {images}/bad.jpg: not an image that can be decoded" in result.stderr
        assert "1 of 2 images have no label" in result.stderr
    assert "failed: bad.jpg" in run("info", tmp_path / "labels").stdout
    missing = run("inspect", tmp_path / "labels", "bad.jpg")
    assert missing.exit_code == 1
    assert "its image failed: not an image" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["annotate", "nowhere", "out", "--model", "resnet18"],
            "nowhere: no such folder of images",
        ),
        (["info", "nowhere"], "nowhere: no label store here"),
        (["verify", "nowhere"], "nowhere: no label store here"),
        (["inspect", "nowhere", "key"], "nowhere: no label store here"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_wrong_usage_is_explained() -> None:
    for wrong in ("12by12", "0", "12x"):
        result = run("annotate", "a", "b", "--model", "m", "--img-size", wrong)
        assert result.exit_code == 2
        assert "not a side such as 288" in result.stderr


def test_class_names_come_from_a_file(photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {number}\n" for number in range(1000)))
    out = tmp_path / "labels"
    assert run("annotate", photos, out, "--classes", names, *SMALL).exit_code == 0
    assert "thing " in run("inspect", out, "coffee.jpg").stdout
    names.write_text("one\ntwo\n")
    result = run("annotate", photos, tmp_path / "other", "--classes", names, *SMALL)
    assert "2 class names for 1000 classes" in result.stderr


def test_inspect_shows_map_legend_and_cell(photo_store: Path) -> None:
    shown = run("inspect", photo_store, "coffee.jpg").stdout
    assert "600x400 pixels" in shown
    assert re.search(r"a +espresso +967 +\d+%", shown)
    # nine rows of nine letters, most of them espresso's
    grid = re.findall(r"^((?:[a-zA-Z.] ){9})", shown, flags=re.MULTILINE)
    assert len(grid) == 9
    assert "".join(grid).count("a") > 30
    cell = run("inspect", photo_store, "coffee.jpg", "--cell", "4,4").stdout
    assert re.search(r"espresso +967 +\d\.\d\d\d +█", cell)
    outside = run("inspect", photo_store, "coffee.jpg", "--cell", "9,0")
    assert outside.exit_code == 1
    assert "outside the 9x9 grid" in outside.stderr
    unknown = run("inspect", photo_store, "no.jpg")
    assert "no sample has the key 'no.jpg'" in unknown.stderr


def test_output_to_a_pipe_has_no_escape_codes(photo_store: Path) -> None:
    for arguments in (["info"], ["inspect", "coffee.jpg"], ["verify"]):
        command = [sys.executable, "-m", "tokenlabel.cli", arguments[0], str(photo_store)]
        done = subprocess.run([*command, *arguments[1:]], capture_output=True, check=True)
        assert b"\x1b" not in done.stdout + done.stderr


def test_info_states_size_and_fidelity_together(photo_store: Path) -> None:
    shown = run("info", photo_store).stdout
    assert re.search(r"images +20 labelled, 0 failed, 20 planned", shown)
    assert re.search(r"bytes an image", shown)
    assert re.search(r"lost to rounding +\d\.\de-04 nats", shown)
    assert re.search(r"0\.\d+ nats a cell \(k = 5", " ".join(shown.split()))


def test_verify_tells_sound_from_damaged(labels: Path, photos: Path, tmp_path: Path) -> None:
    sound = run("verify", labels, "--source", photos)
    assert sound.exit_code == 0
    assert "is sound: 20 maps in 3 shards" in sound.stdout
    shard = labels / "maps.zarr" / "entries" / "c.1.0.0.0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    (tmp_path / "fewer").mkdir()
    (tmp_path / "fewer" / "coffee.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    damaged = run("verify", labels, "--source", tmp_path / "fewer")
    assert damaged.exit_code == 1
    assert f"{shard}: the SHA-256 is not the one that was committed" in damaged.stdout
    assert "chelsea.jpg: in the store, not in the source" in damaged.stdout
    assert len(damaged.stdout.splitlines()) == 1 + 19
    assert "20 faults" in damaged.stderr


@pytest.fixture
def examples_of() -> Callable[[str], list[str]]:
    def find(command: str) -> list[str]:
        text = run(*command.split(), "--help").stdout
        block = re.search(r"Examples?:\n((?: {4,}tokenlabel .*\n)+)", text)
        assert block is not None, f"{command} --help has no example"
        return [line.strip() for line in block[1].splitlines()]

    return find


@pytest.mark.parametrize("command", ["annotate", "info", "inspect", "verify"])
def test_help_has_examples_that_parse(
    command: str, examples_of: Callable[[str], list[str]]
) -> None:
    for example in examples_of(command):
        words = example.split()
        assert words[:2] == ["tokenlabel", command]
        parsed = main.commands[command].make_context(command, words[2:])
        assert parsed.params
