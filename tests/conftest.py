"""Honest fixtures: real photographs, real ImageNet weights, small real networks."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def photos() -> Path:
    """20 photographs of several aspects."""
    return ROOT / "examples" / "photos"


@pytest.fixture(scope="session")
def lite0_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, made by the example."""
    spec = importlib.util.spec_from_file_location(
        "lite0_weights", ROOT / "examples" / "lite0_weights.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    module.write_lite0(path)
    return path


@pytest.fixture(scope="session")
def photo_store(
    photos: Path, lite0_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The photographs, labelled by EfficientNet-Lite0 at 288 pixels in this process."""
    from tokenlabel.annotate import annotate

    out = tmp_path_factory.mktemp("store") / "labels"
    annotate(
        photos,
        out,
        model="tf_efficientnet_lite0",
        checkpoint=lite0_checkpoint,
        img_size=288,
        batch_size=4,
        shard_size=8,
        workers=0,
    )
    return out


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every object of a store, by its name.

    Scratch files do not count: workers that outlived a killed driver may be writing theirs.
    """
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".tmp" not in path.parts
    }


@pytest.fixture(scope="session", name="tree_digest")
def _tree_digest() -> object:
    return tree_digest
