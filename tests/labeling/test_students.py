from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tokenlabel.labeling import TokenLabelLoss, TokenLabelStudent
from tokenlabel.labeling.errors import InvalidTargetsError, UnsupportedModelError
from tokenlabel.labeling.geometry import identity
from tokenlabel.labeling.replay import replay
from tokenlabel.storage import LabelMap


def create(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=7, **options)


@pytest.mark.parametrize(
    ("name", "options", "size", "grid"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, (64, 64), (4, 4)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96), (4, 6)),
        ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}, (64, 64), (4, 4)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, (64, 64), (4, 4)),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 1, 1, 1)},
            (64, 64),
            (2, 2),
        ),
        ("resnet10t", {}, (176, 176), (6, 6)),
    ],
)
def test_training_gives_class_and_token_logits_and_evaluation_the_networks_own(
    name: str, options: dict[str, Any], size: tuple[int, int], grid: tuple[int, int]
) -> None:
    student = TokenLabelStudent(create(name, **options))
    assert student.token_grid == grid
    images = torch.randn(2, 3, *size)
    class_logits, token_logits = student.train()(images)
    assert class_logits.shape == (2, 7)
    assert token_logits.shape == (2, grid[0] * grid[1], 7)
    token_logits.sum().backward()
    gradient = student.token_head.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(student(images), student.model(images))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}),
        ("deit_tiny_distilled_patch16_224", {"img_size": (64, 96)}),
    ],
)
def test_tokens_are_the_networks_patches_in_row_major_order(
    name: str, options: dict[str, Any]
) -> None:
    student = TokenLabelStudent(create(name, **options)).train()
    with torch.no_grad():
        features = student.model.forward_features(images := torch.randn(1, 3, 64, 96))
        expected = student.token_head(features[:, -24:])
        torch.testing.assert_close(student(images)[1], expected)


@pytest.mark.parametrize(
    ("name", "channels_last"), [("swin_tiny_patch4_window7_224", True), ("convnext_atto", False)]
)
def test_cells_of_a_feature_map_become_tokens_in_row_major_order(
    name: str, channels_last: bool
) -> None:
    options = {"img_size": (64, 128)} if channels_last else {}
    student = TokenLabelStudent(create(name, **options), input_size=(3, 64, 128)).eval()
    assert student.token_grid == (2, 4)
    with torch.no_grad():
        features = student.model.forward_features(images := torch.randn(1, 3, 64, 128))
        student.training = True  # token logits, but without dropping paths
        tokens = student(images)[1].unflatten(1, (2, 4))
        for row in range(2):
            for column in range(4):
                cell = features[:, row, column] if channels_last else features[..., row, column]
                torch.testing.assert_close(tokens[:, row, column], student.token_head(cell))


def test_the_network_is_left_as_it_was() -> None:
    model = create("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = TokenLabelStudent(model.train())
    assert model.training
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert set(student.state_dict()) == {f"model.{name}" for name in before} | {
        "token_head.weight",
        "token_head.bias",
    }


def test_another_input_size_can_be_said() -> None:
    model = create("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    student = TokenLabelStudent(model, input_size=(3, 32, 80)).train()
    assert student.token_grid == (2, 5)
    assert student(torch.zeros(1, 3, 32, 80))[1].shape == (1, 10, 7)
    with pytest.raises(InvalidTargetsError, match=r"expected images of \(3, 32, 80\)"):
        student(torch.zeros(1, 3, 64, 64))


def test_dropped_patches_are_refused_in_training() -> None:
    model = create("vit_tiny_patch16_224", img_size=64, patch_drop_rate=0.5)
    with pytest.raises(InvalidTargetsError, match="do not drop patches"):
        TokenLabelStudent(model).train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no `forward_features`"),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0),
            "num_classes=0: create it with",
        ),
        (lambda: create("pit_ti_224"), "PoolingVisionTransformer gives"),
    ],
)
def test_models_that_cannot_be_wrapped_are_refused(
    model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        TokenLabelStudent(model())


def test_a_student_learns_what_the_maps_say(position_map: Callable[..., LabelMap]) -> None:
    student = TokenLabelStudent(
        timm.create_model(
            "vit_tiny_patch16_224", img_size=64, num_classes=16, depth=2, embed_dim=48, num_heads=3
        )
    ).train()
    targets = replay([position_map(4, 4)] * 2, identity().repeat(2, 1, 1), student.token_grid)
    criterion = TokenLabelLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        loss = criterion(student(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2  # ln 16 = 2.8 nats of the tokens can be learnt
