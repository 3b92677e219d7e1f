"""The benchmarks run and print what they promise; what they measure is no test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

PROMISED = {
    "annotate.py": (
        ["--model", "test_efficientnet", "--img-size", "64", "--count", "16", "--rounds", "1"],
        {"efficiency", "bare_images_per_second", "annotate_images_per_second", "stages", "device"},
    ),
}


def test_every_benchmark_is_tried() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("script", PROMISED)
def test_the_last_line_is_the_promised_json(script: str) -> None:
    arguments, keys = PROMISED[script]
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1])) == keys
