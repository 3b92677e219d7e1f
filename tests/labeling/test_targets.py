import pytest
import torch
from torch import Tensor

from tokenlabel.labeling import TokenTargets
from tokenlabel.labeling.errors import InvalidTargetsError
from tokenlabel.labeling.targets import merge_repeated


@pytest.fixture
def targets() -> TokenTargets:
    pooled = TokenTargets(
        torch.tensor([[[3]]], dtype=torch.int32),
        torch.tensor([[[0.5]]]),
        torch.tensor([[0.125]]),
        torch.tensor([[1.0]]),
    )
    return TokenTargets(
        torch.tensor([[[1, 2, 1], [0, 0, 0]]], dtype=torch.int32),
        torch.tensor([[[0.25, 0.25, 0.1], [0, 0, 0]]]),
        torch.tensor([[0.1, 0.25]]),
        torch.tensor([[1.0, 0.0]]),
        pooled,
    )


def test_dense_adds_repeated_ids_to_the_base(targets: TokenTargets) -> None:
    expected = torch.tensor([[[0.1, 0.45, 0.35, 0.1], [0.25, 0.25, 0.25, 0.25]]])
    torch.testing.assert_close(targets.dense(4), expected)
    assert len(targets) == 1


def test_dense_refuses_too_few_classes(targets: TokenTargets) -> None:
    with pytest.raises(InvalidTargetsError, match="class ids 0 to 2, expected 0 to 1"):
        targets.dense(2)


def test_moving_takes_the_class_target_along(targets: TokenTargets) -> None:
    moved = targets.to("meta", non_blocking=True)
    assert moved.base.is_meta
    assert moved.class_target is not None
    assert moved.class_target.excess.is_meta
    same = targets.to("cpu").class_target
    assert same is not None
    assert same.class_ids.item() == 3


def test_pinning_pins_every_tensor(targets: TokenTargets, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    targets.pin_memory()
    assert len(pinned) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.zeros(1, 3)}, r"base and weight \[B, N\]"),
        ({"excess": torch.zeros(1, 2, 2)}, r"class_ids and excess \[B, N, M\]"),
        ({"class_ids": torch.zeros(1, 2, 3, dtype=torch.int64)}, "int32 class_ids"),
        ({"excess": torch.zeros(1, 2, 3, dtype=torch.float16)}, "float32 excess"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    targets: TokenTargets, change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InvalidTargetsError, match=message):
        TokenTargets(**{**vars(targets), **change})


def test_a_class_target_has_one_token_an_image(targets: TokenTargets) -> None:
    with pytest.raises(InvalidTargetsError, match="one token for each of 1 images"):
        TokenTargets(**{**vars(targets), "class_target": targets})


def test_merging_adds_up_and_drops_zeros() -> None:
    ids = torch.tensor([[5, 2, 5, 9, 0], [0, 7, 0, 0, 0]], dtype=torch.int32)
    values = torch.tensor([[1.0, 2, 3, 0, 0], [4, 0, 0.5, 0, 0]])
    merged, summed = merge_repeated(ids, values)
    assert merged.tolist() == [[2, 5], [0, 0]]
    assert summed.tolist() == [[2, 4], [4.5, 0]]
    assert merged.dtype == torch.int32


def test_merging_nothing_leaves_one_padding_entry() -> None:
    merged, summed = merge_repeated(torch.ones(2, 3, dtype=torch.int32), torch.zeros(2, 3))
    assert merged.tolist() == [[0], [0]]
    assert summed.tolist() == [[0], [0]]
