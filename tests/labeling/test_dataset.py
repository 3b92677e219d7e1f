import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tokenlabel.annotate import DenseAnnotator, Preprocessing, annotate
from tokenlabel.labeling import ReplayMap, TokenLabelBatch, TokenLabelCollate, TokenLabelDataset
from tokenlabel.labeling.errors import MissingSamplesError, ReplayError, UnreadableImageError
from tokenlabel.storage import open_store

Transform = Callable[[Image.Image, ReplayMap], tuple[Tensor, ReplayMap]]


def first_two(images: Tensor) -> Tensor:
    """Scores of two classes on a 2x2 grid: how red and how green each quarter is."""
    return torch.nn.functional.adaptive_avg_pool2d(images[:, :2], 2)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "images" / ("apple" if number < 3 else "pear")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def labels(images: Path, tmp_path: Path) -> Path:
    annotator = DenseAnnotator.from_callable(first_two, Preprocessing((32, 32)), 2)
    annotate(images, tmp_path / "labels", model=annotator, workers=0, batch_size=2)
    return tmp_path / "labels"


@pytest.fixture
def transform() -> Transform:
    transform: Transform = v2.Compose(
        [
            v2.RandomResizedCrop(16),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return transform


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_batches_come_out_of_worker_processes(
    images: Path, labels: Path, transform: Transform, context: str
) -> None:
    dataset = TokenLabelDataset(images, labels, transform)
    len(dataset.store[0].class_ids)  # the parent has read before it forks
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=4,
        num_workers=2,
        collate_fn=TokenLabelCollate((2, 2)),
        multiprocessing_context=context,
    )
    batches: list[TokenLabelBatch] = list(loader)
    assert [len(batch.images) for batch in batches] == [4, 2]
    for batch in batches:
        assert batch.images.shape[1:] == (3, 16, 16)
        assert batch.targets.base.shape == (len(batch.images), 4)
        assert torch.allclose(batch.targets.dense(2).sum(dim=-1), torch.tensor(1.0))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 0, 0, 1, 1, 1]


def test_target_and_image_move_together(images: Path, labels: Path) -> None:
    def mirror(image: Image.Image, replay_map: ReplayMap) -> tuple[Tensor, ReplayMap]:
        moved = v2.functional.horizontal_flip(image), v2.functional.horizontal_flip(replay_map)
        return v2.functional.to_image(moved[0]), moved[1]

    def keep(image: Image.Image, replay_map: ReplayMap) -> tuple[Tensor, ReplayMap]:
        return v2.functional.to_image(image), replay_map

    collate = TokenLabelCollate((2, 2))
    plain = collate([TokenLabelDataset(images, labels, keep)[2]])
    mirrored = collate([TokenLabelDataset(images, labels, mirror)[2]])
    assert torch.equal(plain.images.flip(-1), mirrored.images)
    quarters = plain.targets.dense(2).view(2, 2, 2)
    assert torch.equal(quarters.flip(1), mirrored.targets.dense(2).view(2, 2, 2))
    expected = torch.tensor(open_store(labels)[2].probabilities()).movedim(0, -1)
    assert torch.allclose(quarters.double(), expected, atol=1e-6)


def test_what_is_missing_is_listed_before_the_first_step(
    images: Path, labels: Path, transform: Transform
) -> None:
    (images / "apple" / "0.png").rename(images / "apple" / "new.png")
    with pytest.raises(
        MissingSamplesError,
        match=r"1 of 6 images have no label, such as apple/new\.png; "
        r"1 of 6 labels have no image, such as apple/0\.png",
    ):
        TokenLabelDataset(images, labels, transform)


def test_images_without_a_label_train_on_their_class(
    images: Path, labels: Path, transform: Transform, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "pear" / "3.png").rename(images / "pear" / "new.png")
    with caplog.at_level(logging.WARNING):
        dataset = TokenLabelDataset(images, labels, transform, on_missing="hard")
    assert "such as pear/new.png" in caplog.text
    assert len(dataset) == 6
    assert dataset.imageless == ["pear/3.png"]
    batch = TokenLabelCollate((2, 2))([dataset[dataset.keys.index("pear/new.png")]])
    assert batch.labels.tolist() == [1]
    assert torch.allclose(batch.targets.dense(2)[0], torch.tensor([0.0, 1.0]).expand(4, 2))


def test_failed_images_are_missing_too(images: Path, tmp_path: Path, transform: Transform) -> None:
    (images / "pear" / "3.png").write_text("no image")
    annotator = DenseAnnotator.from_callable(first_two, Preprocessing((32, 32)), 2)
    annotate(images, tmp_path / "labels", model=annotator, workers=0)
    with pytest.raises(MissingSamplesError, match=r"1 of 6 images have no label.*pear/3\.png"):
        TokenLabelDataset(images, tmp_path / "labels", transform)


def test_images_with_neither_label_nor_class_are_refused(
    images: Path, labels: Path, transform: Transform
) -> None:
    (images / "plum").mkdir()
    Image.new("RGB", (9, 9)).save(images / "plum" / "1.png")
    with pytest.raises(MissingSamplesError, match=r"neither a label nor a class.*plum/1\.png"):
        TokenLabelDataset(images, labels, transform, on_missing="hard")
    dataset = TokenLabelDataset(
        images, labels, transform, on_missing="hard", class_of=lambda key: int("plum" in key)
    )
    assert dataset[dataset.keys.index("plum/1.png")][2] == 1


def test_images_come_from_any_mapping(labels: Path, images: Path, transform: Transform) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG")
    sources: dict[str, Any] = {
        f"{'apple' if n < 3 else 'pear'}/{n}.png": source
        for n, source in enumerate(
            [buffer.getvalue(), Image.new("RGB", (8, 8)), *sorted(images.rglob("*.png"))[2:]]
        )
    }
    dataset = TokenLabelDataset(sources, labels, transform)
    assert [dataset[n][0].shape for n in range(6)] == [(3, 16, 16)] * 6


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_rotated_photographs_train_upright(tmp_path: Path, orientation: int) -> None:
    """Red left of green when upright, however the camera was held and the image is given."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16, 0], pixels[:, 16:, 1] = 255, 255
    turns = {1: 0, 3: 2, 6: 1}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.png"
    Image.fromarray(np.rot90(pixels, turns).copy()).save(path, exif=exif)
    plain = Preprocessing((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    annotator = DenseAnnotator.from_callable(first_two, plain, 2)
    annotate(tmp_path / "images", tmp_path / "labels", model=annotator, workers=0)
    given: list[Any] = [path, str(path), path.read_bytes(), Image.open(path)]
    for image in given:
        dataset = TokenLabelDataset({"a.png": image}, tmp_path / "labels", to_tensor)
        crop, replay_map, label = dataset[0]
        assert torch.equal(crop, torch.tensor(pixels).movedim(-1, 0))
        targets = TokenLabelCollate((2, 2))([(crop, replay_map, label)]).targets
        assert targets.dense(2)[0].argmax(dim=-1).tolist() == [0, 1, 0, 1]


def to_tensor(image: Image.Image, replay_map: ReplayMap) -> tuple[Tensor, ReplayMap]:
    return v2.functional.to_image(image).as_subclass(Tensor), replay_map


def test_wrong_arguments_are_found_before_the_first_step(
    images: Path, labels: Path, transform: Transform
) -> None:
    with pytest.raises(MissingSamplesError, match="'error' or 'hard', got 'ignore'"):
        TokenLabelDataset(images, labels, transform, on_missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(MissingSamplesError, match="there are no images"):
        TokenLabelDataset({}, labels, transform, on_missing="hard")
    (images / "pear" / "3.png").rename(images / "pear" / "new.png")
    with pytest.raises(MissingSamplesError, match=r"a class of 0 to 1, such as pear/new\.png"):
        TokenLabelDataset(images, labels, transform, on_missing="hard", class_of=lambda _: 7)


def test_an_image_that_cannot_be_decoded_is_named(
    images: Path, labels: Path, transform: Transform
) -> None:
    dataset = TokenLabelDataset(images, labels, transform)
    (images / "apple" / "1.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"apple/1\.png: cannot be decoded"):
        dataset[1]


def test_a_transform_that_loses_the_map_is_named(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, lambda image, _: image)  # type: ignore[arg-type,return-value]
    with pytest.raises(ReplayError, match=r"apple/0\.png: the transform must give"):
        dataset[0]
