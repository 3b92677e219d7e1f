from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenlabel.storage import GridView, LabelMap


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lite0_maps() -> list[LabelMap]:
    """Twelve real maps, 1000 classes, top 5, 18 x 18 cells.

    Made from maps of EfficientNet-Lite0 at 576 pixels over ImageNet validation images: every 41st
    of 500 images; raw logits and the log-sum-exp of all classes were turned into tail-relative
    logits by `tokenlabel.storage.encoding.tail_relative_logits`, with the next five entries as a
    lower bound of the tail where float32 left none, and kept as float16.
    """
    with np.load(Path(__file__).with_name("lite0_maps.npz")) as file:
        class_ids, logits = file["class_ids"], file["logits"]
    return [
        LabelMap(ids.astype(np.int32), c.astype(np.float32), 1000, GridView.stretch())
        for ids, c in zip(class_ids, logits, strict=True)
    ]


@pytest.fixture(scope="session")
def position_map() -> Callable[..., LabelMap]:
    """Makes a map of H x W cells in which every cell is its own class, row-major."""

    def make(height: int = 18, width: int = 18, view: GridView | None = None) -> LabelMap:
        cells = np.eye(height * width).reshape(height * width, height, width)
        return LabelMap.from_probabilities(cells, k=1, view=view)

    return make
