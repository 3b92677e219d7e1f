"""What users install: the wheel's contents, and that it works away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("annotate", "labeling", "storage")
# Every Python file at the top level would ship: scripts belong into examples/ or tools/.
TOP_LEVEL = {"__init__.py", "cli.py", "images.py", "inspection.py", "pictures.py", "py.typed"}
HEAVY = ("torch", "torchvision", "timm", "zarr", "ray", "webdataset", "numpy", "numba", "PIL")


def run(*command: object, cwd: Path) -> str:
    """Output of a command that sees neither the checkout nor what this process was told."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Distributions:
    source: Path  # a copy of the checkout without what git ignores
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The source distribution of a clean copy, and the wheel made from that distribution."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "checkout"
    names = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT
    ).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=copy)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Distributions(copy, sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of an environment with the wheel and, through a .pth file, its dependencies."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home, symlinks=True)
    scripts, python = home / "bin", home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-compile", built.wheel),
        cwd=home,
    )
    packages = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=home)[:-1]
    )
    # A .pth file adds a folder; those inside that folder, the checkout's editable install among
    # them, are not run.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_holds_the_package_and_nothing_else(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    found = {name for name in names if ".dist-info/" not in name}
    expected = {f"tokenlabel/{name}" for name in TOP_LEVEL if (built.source / name).exists()}
    for package in PACKAGES:
        modules = {path.name for path in (built.source / package).glob("*.py")}
        assert "__init__.py" in modules
        expected |= {f"tokenlabel/{package}/{module}" for module in modules}
    assert found == expected
    assert {"tokenlabel/cli.py", "tokenlabel/py.typed"} <= found
    information = {name.partition(".dist-info/")[2] for name in names - found}
    assert information == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"),
        "licenses/LICENSE",
    }


def test_the_source_distribution_holds_tests_and_photographs(built: Distributions) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("benchmarks", "docs", "examples", "tests", "tools"):
        for path in (built.source / folder).rglob("*"):
            if path.is_file():
                assert path.relative_to(built.source).as_posix() in names
    assert "examples/photos/chelsea.jpg" in names
    assert "tests/storage/lite0_maps.npz" in names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_installed_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import tokenlabel.cli as c; print(c.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    (tmp_path / "photos").mkdir()
    for name, colour in (("red.jpg", (200, 30, 20)), ("blue.jpg", (10, 40, 220))):
        Image.new("RGB", (80, 60), colour).save(tmp_path / "photos" / name)
    assert "annotate" in run(installed / "tokenlabel", "--help", cwd=tmp_path)
    out = run(
        *(installed / "tokenlabel", "annotate", "photos", "labels"),
        *("--model", "test_efficientnet", "--no-pretrained", "--img-size", 64, "--workers", 0),
        cwd=tmp_path,
    )
    assert "2 images labelled" in out
    run(installed / "tokenlabel", "verify", "labels", "--source", "photos", cwd=tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "import tokenlabel",
        "from tokenlabel.cli import main; main(['--help'], standalone_mode=False)",
        "from tokenlabel.cli import main; main(['annotate', '--help'], standalone_mode=False)",
    ],
)
def test_importing_and_asking_for_help_load_nothing_heavy(code: str, tmp_path: Path) -> None:
    say = "import sys; print('loaded', *(m for m in sys.argv[1:] if m in sys.modules))"
    out = run(sys.executable, "-c", f"{code}\n{say}", *HEAVY, cwd=tmp_path)
    assert out.splitlines()[-1] == "loaded"
