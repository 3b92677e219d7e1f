"""Every page's code runs as a reader would run it: from the repository's root, top to bottom."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def run_console(example: Example) -> None:
    """Run each `$ command` of a block in a shell; other lines are what it shows."""
    script = "\n".join(
        line.removeprefix("$ ") if line.startswith("$ ") else line
        for line in example.parsed.splitlines()
        if line.startswith(("$ ", "    "))
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    if done.returncode != 0:
        raise AssertionError(f"{shlex.quote(script)}\n{done.stdout}{done.stderr}")


@pytest.mark.parametrize("page", PAGES)
def test_code_in_the_docs_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    document = Document.parse(
        str(ROOT / page),
        CodeBlockParser("python", PythonEvaluator()),
        CodeBlockParser("console", run_console),
    )
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    import re

    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
