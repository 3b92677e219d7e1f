from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tokenlabel.annotate import DenseAnnotator, Preprocessing, annotate
from tokenlabel.cli import main

RED, GREEN = 0, 1


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph whose left third is red and the rest green, and its labels: which it is."""
    root = tmp_path_factory.mktemp("halves")
    pixels = np.zeros((120, 180, 3), dtype=np.uint8)
    pixels[:, :60, RED], pixels[:, 60:, GREEN] = 255, 255
    (root / "images").mkdir()
    Image.fromarray(pixels).save(root / "images" / "halves.png")

    def colour(images: Tensor) -> Tensor:
        return 30 * nn.functional.adaptive_avg_pool2d(images[:, :2], 6)

    annotator = DenseAnnotator.from_callable(
        colour, Preprocessing((96, 96), (0, 0, 0), (1, 1, 1)), 2, ["red thing", "green thing"]
    )
    annotate(root / "images", root / "labels", model=annotator, workers=0)
    return root


def panels(png: Path) -> list[NDArray[np.uint8]]:
    """The pictures within a picture: what lies between columns of plain white."""
    pixels = np.asarray(Image.open(png).convert("RGB"))
    blank = pixels.min(axis=(0, 2)) >= 250
    edges = np.flatnonzero(np.diff(blank.astype(int)))
    runs = zip(edges[:-1] + 1, edges[1:] + 1, strict=True)
    wide = [(a, b) for a, b in runs if not blank[a] and b - a > 300]
    # inside frame and title, at half height
    return [pixels[pixels.shape[0] // 2, a + 8 : b - 8] for a, b in wide]


def share_of_first_colour(row: NDArray[np.uint8]) -> tuple[float, bool]:
    """Share of the row that has the colour of its right end, and whether it starts with it."""
    end = np.abs(row.astype(int) - row[-1].astype(int)).sum(axis=1) < 60
    return float(end.mean()), bool(end[0])


def test_regions_are_drawn_where_the_classes_are(halves: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    result = run(
        "inspect", halves / "labels", "halves.png", "--image", halves / "images", "--png", out
    )
    assert result.exit_code == 0, result.output
    assert f"Picture: {out}" in result.output
    _, labelled = panels(out)
    share, starts = share_of_first_colour(labelled)
    assert share == pytest.approx(2 / 3, abs=0.02)
    assert not starts


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_shows_its_replayed_targets(halves: Path, tmp_path: Path, flip: bool) -> None:
    out = tmp_path / "crop.png"
    file = halves / "images" / "halves.png"  # the file itself does as well as its folder
    arguments = ["inspect", halves / "labels", "halves.png", "--image", file, "--png", out]
    # The crop runs over x 1/6 to 1/2: half of it is red.
    result = run(*arguments, "--crop", "0.1667,0.1,0.5,0.9", *(["--flip"] if flip else []))
    assert result.exit_code == 0, result.output
    _, crop = panels(out)
    share, starts = share_of_first_colour(crop)
    assert share == pytest.approx(1 / 2, abs=0.06)  # to half a token
    assert not starts
    # The palette's first colour, orange, is the green thing's, which most cells are.
    orange_at_left = int(crop[10, RED]) > int(crop[-10, RED])
    assert orange_at_left == flip


def test_bad_pictures_are_refused(halves: Path, tmp_path: Path) -> None:
    labels, images, png = halves / "labels", halves / "images", tmp_path / "x.png"
    whole = ["inspect", labels, "halves.png"]
    picture = [*whole, "--image", images, "--png", png]
    for arguments, message, status in [
        ([*picture, "--crop", "0.5,0,0.4,1"], "no box x0,y0,x1,y1 within the image", 1),
        ([*picture, "--crop", "0,0,2,1"], "no box x0,y0,x1,y1 within the image", 1),
        ([*picture, "--crop", "left"], "not a box such as", 2),
        ([*whole, "--png", png], "needs --png and --image", 2),
        ([*whole, "--image", tmp_path / "none.jpg", "--png", png], "none.jpg", 2),
        ([*whole, "--image", images, "--png", tmp_path / "no" / "x.png"], "x.png", 2),
    ]:
        result = run(*arguments)
        assert result.exit_code == status, arguments
        assert message in result.output
    assert not png.exists()
