import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

from tokenlabel.labeling import ReplayMap, replay
from tokenlabel.labeling.errors import UnsupportedTransformError
from tokenlabel.labeling.geometry import horizontal_flip, image_from_box
from tokenlabel.labeling.replay_map import targets_from
from tokenlabel.storage import LabelMap, TokenLabelError

WIDTH, HEIGHT = 61, 43


def as_image(kind: str) -> Any:
    pixels = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    if kind == "pil":
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return pixels if kind == "tensor" else tv_tensors.Image(pixels)


@pytest.fixture
def replay_map(position_map: Callable[..., LabelMap]) -> ReplayMap:
    return ReplayMap(position_map(4, 4), (HEIGHT, WIDTH))


def coordinates() -> tv_tensors.Image:
    """Position-coded pixels: x and y of their centres in the image frame, float64."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return tv_tensors.Image(torch.from_numpy(np.stack([x / WIDTH, y / HEIGHT])))


MOVING = [
    v2.RandomResizedCrop(32),
    v2.RandomResizedCrop((24, 40), scale=(0.1, 0.3)),
    v2.RandomHorizontalFlip(1.0),
    v2.RandomVerticalFlip(1.0),
    v2.Resize(30),
    v2.Resize((20, 50)),
    v2.Resize(30, max_size=40),
    v2.Resize(None, max_size=50),
    v2.RandomCrop((20, 30)),
    v2.CenterCrop(20),
    v2.CenterCrop((30, 25)),
    v2.CenterCrop((43, 61)),
    v2.RandomShortestSize([20, 30]),
    v2.RandomResize(20, 30),
    v2.Compose([v2.Resize(40), v2.RandomCrop(32), v2.RandomHorizontalFlip()]),
    v2.RandomApply([v2.RandomResizedCrop(16)], p=0.5),
    v2.RandomChoice([v2.CenterCrop(20), v2.RandomVerticalFlip(1.0)]),
]


@pytest.mark.parametrize("transform", MOVING, ids=repr)
@pytest.mark.parametrize("kind", ["pil", "tensor", "image"])
def test_image_and_map_move_together(
    replay_map: ReplayMap, transform: v2.Transform, kind: str
) -> None:
    torch.manual_seed(0)
    image, moved = transform(as_image(kind), replay_map)
    assert type(moved) is ReplayMap
    assert list(moved.canvas_size) == F.get_size(image) == F.get_size(moved)
    assert moved.label_map is replay_map.label_map


@pytest.mark.parametrize("transform", MOVING, ids=repr)
def test_the_matrix_says_where_pixels_come_from(
    replay_map: ReplayMap, transform: v2.Transform
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        image, moved = transform(coordinates(), replay_map)
        height, width = moved.canvas_size
        y, x = np.mgrid[:height, :width] + 0.5
        crop = np.stack([x / width, y / height, np.ones_like(x)])
        expected = np.einsum("ij,jyx->iyx", moved.image_from_crop.numpy(), crop)[:2]
        # Resampling clamps at the rim, so there pixels are pulled inwards.
        inner = np.s_[:, height // 4 : -height // 4, width // 4 : -width // 4]
        error = image.numpy()[inner] - expected[inner]
        # Antialiasing ripples by a tenth of a source pixel, without a bias.
        assert np.abs(error).max() < 0.12 / HEIGHT
        assert np.abs(error.mean((1, 2))).max() < 0.01 / HEIGHT


@pytest.mark.parametrize("size", [(48, 70), (44, 20), (20, 64), (50, 61)])
def test_crops_beyond_the_canvas_show_padding_where_the_matrix_says(
    replay_map: ReplayMap, size: tuple[int, int]
) -> None:
    ones = tv_tensors.Image(torch.ones(1, HEIGHT, WIDTH))
    for transform in (v2.CenterCrop(size), lambda *s: [F.crop(i, -3, 7, *size) for i in s]):
        image, moved = transform(ones, replay_map)
        (x_scale, _, x0), (_, y_scale, y0), _ = moved.image_from_crop.tolist()
        x = x0 + (np.arange(size[1]) + 0.5) / size[1] * x_scale
        y = y0 + (np.arange(size[0]) + 0.5) / size[0] * y_scale
        shown = ((y > 0) & (y < 1))[:, None] & ((x > 0) & (x < 1))
        np.testing.assert_array_equal(image[0].numpy() > 0, shown)


def test_transforms_compose_into_one_crop(replay_map: ReplayMap) -> None:
    moved = F.horizontal_flip(F.resize(F.crop(replay_map, 4, 10, 20, 40), [10, 10]))
    moved = F.crop(moved, 0, 0, 5, 10)
    x0, x1, y0, y1 = 10 / WIDTH, 50 / WIDTH, 4 / HEIGHT, 14 / HEIGHT
    expected = image_from_box((x0, y0, x1, y1)) @ horizontal_flip()
    torch.testing.assert_close(moved.image_from_crop, expected)
    assert moved.canvas_size == (5, 10)
    torch.testing.assert_close(replay_map.image_from_crop, torch.eye(3, dtype=torch.float64))


def test_an_image_of_another_size_is_refused(replay_map: ReplayMap) -> None:
    with pytest.raises(ValueError, match="multiple HxW"):
        v2.RandomResizedCrop(16)(torch.zeros(3, 43, 60), replay_map)


PHOTOMETRIC = [
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    v2.GaussianBlur(3),
    v2.Grayscale(3),
    v2.RandomSolarize(128, 1.0),
    v2.RandomAdjustSharpness(2, 1.0),
    v2.RandomAutocontrast(1.0),
    v2.RandomPhotometricDistort(),
    v2.ToDtype(torch.float32, scale=True),
    v2.ToDtype({tv_tensors.Image: torch.float32, "others": torch.float16}, scale=True),
    v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)]),
    v2.ToImage(),
    v2.Identity(),
]


@pytest.mark.parametrize("transform", PHOTOMETRIC, ids=repr)
def test_photometric_transforms_leave_the_map_alone(
    replay_map: ReplayMap, transform: v2.Transform
) -> None:
    _, kept = transform(as_image("image"), replay_map)
    assert kept is replay_map


def test_random_erasing_leaves_the_map_alone(replay_map: ReplayMap) -> None:
    with pytest.warns(UserWarning, match="passing through inputs of type tv_tensors.ReplayMap"):
        _, kept = v2.RandomErasing(1.0)(as_image("image"), replay_map)
    assert kept is replay_map


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (v2.Pad(3), "Pad"),
        (v2.RandomZoomOut(p=1.0), "RandomZoomOut"),
        (v2.RandomCrop(32, padding=4), "RandomCrop with padding"),
        (v2.RandomRotation(10), "RandomRotation"),
        (v2.RandomAffine(10), "RandomAffine"),
        (v2.RandomPerspective(p=1.0), "RandomPerspective"),
        (v2.ElasticTransform(), "ElasticTransform"),
    ],
)
@pytest.mark.parametrize("kind", ["pil", "image"])
def test_other_geometric_transforms_are_refused_by_name(
    replay_map: ReplayMap, transform: v2.Transform, named: str, kind: str
) -> None:
    with pytest.raises(UnsupportedTransformError, match=named) as caught:
        transform(as_image(kind), replay_map)
    assert isinstance(caught.value, TokenLabelError)


@pytest.mark.parametrize("transform", [v2.FiveCrop(20), v2.TenCrop(20)])
def test_five_and_ten_crop_are_refused_by_name(
    replay_map: ReplayMap, transform: v2.Transform
) -> None:
    name = type(transform).__name__
    with pytest.raises(TypeError, match=name):
        transform(as_image("image"), replay_map)
    functional = F.five_crop if name == "FiveCrop" else F.ten_crop
    with pytest.raises(UnsupportedTransformError, match=name):
        functional(replay_map, [20, 20])


@pytest.mark.parametrize(
    "transform", [v2.RandAugment(), v2.AutoAugment(), v2.TrivialAugmentWide(), v2.AugMix()]
)
@pytest.mark.parametrize("kind", ["pil", "tensor", "image"])
def test_automatic_augmentation_is_refused(
    replay_map: ReplayMap, transform: v2.Transform, kind: str
) -> None:
    with pytest.raises(
        TypeError, match=rf"ReplayMap are not supported by {type(transform).__name__}"
    ):
        transform(as_image(kind), replay_map)


@pytest.mark.parametrize("transform", [v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])
def test_mixing_with_maps_is_refused(replay_map: ReplayMap, transform: v2.Transform) -> None:
    with pytest.raises(ValueError, match="does not support"):
        transform(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), replay_map)


def test_no_kernel_of_mask_is_inherited() -> None:
    inherited = {
        functional.__name__
        for functional, kernels in _KERNEL_REGISTRY.items()
        if tv_tensors.Mask in kernels and ReplayMap not in kernels
    }
    assert inherited == set()


def test_copies_keep_label_and_canvas(replay_map: ReplayMap) -> None:
    moved = F.crop(replay_map, 1, 2, 10, 20)
    for other in (copy.deepcopy(moved), moved.clone(), moved.detach(), moved.to("cpu")):
        assert type(other) is ReplayMap
        assert other.canvas_size == (10, 20)
        assert other.label_map is moved.label_map
        assert torch.equal(other.image_from_crop, moved.image_from_crop)
    unpickled = pickle.loads(pickle.dumps(moved))
    assert unpickled.canvas_size == (10, 20)
    assert torch.equal(unpickled.image_from_crop, moved.image_from_crop)
    assert np.array_equal(unpickled.label_map.class_ids, moved.label_map.class_ids)


def test_torchvisions_global_return_type_does_no_harm(replay_map: ReplayMap) -> None:
    with tv_tensors.set_return_type("TVTensor"):
        moved = F.horizontal_flip(F.crop(replay_map, 0, 0, 20, 30))
        targets = targets_from([moved, moved], (3, 3))
    plain = F.horizontal_flip(F.crop(replay_map, 0, 0, 20, 30))
    assert torch.equal(moved.image_from_crop, plain.image_from_crop)
    assert torch.equal(targets.dense(16)[1], targets_from([plain], (3, 3)).dense(16)[0])


def test_repr_says_what_it_is(replay_map: ReplayMap) -> None:
    assert repr(replay_map).startswith("ReplayMap(grid=(4, 4), canvas_size=(43, 61)")


def test_targets_from_replays_the_batch_at_once(replay_map: ReplayMap) -> None:
    crops = [F.crop(replay_map, 0, 0, 20, 30), F.vertical_flip(replay_map)]
    targets = targets_from(crops, (3, 5))
    expected = replay(
        [replay_map.label_map] * 2, torch.stack([crop.image_from_crop for crop in crops]), (3, 5)
    )
    assert torch.equal(targets.dense(16), expected.dense(16))
    assert type(targets.base) is torch.Tensor
