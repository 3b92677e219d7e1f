import dataclasses

import pytest
import torch
from torch import Tensor

from tokenlabel.labeling import TokenLabelLoss, TokenTargets, replay
from tokenlabel.labeling.errors import InvalidTargetsError
from tokenlabel.labeling.geometry import image_from_box
from tokenlabel.labeling.loss import token_cross_entropy
from tokenlabel.storage import LabelMap
from tokenlabel.storage.errors import SettingsError

B, N, C, M = 3, 5, 11, 6


def random_targets(tokens: int = N, seed: int = 0) -> TokenTargets:
    """Normalised distributions, ids repeated and padded, weights between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.randint(C, (B, tokens, M), generator=generator, dtype=torch.int32)
    excess = torch.rand(B, tokens, M, generator=generator)
    class_ids[..., -1], excess[..., -1] = 0, 0
    excess = excess / excess.sum(-1, keepdim=True) * 0.8
    weight = torch.rand(B, tokens, generator=generator)
    weight[0, 0], weight[-1, -1] = 0, 1
    return TokenTargets(class_ids, excess, torch.full((B, tokens), 0.2 / C), weight)


def class_target_of(targets: TokenTargets) -> TokenTargets:
    assert targets.class_target is not None
    return targets.class_target


def dense_loss(logits: Tensor, targets: TokenTargets) -> Tensor:
    """Plain soft cross-entropy in float64."""
    q = torch.zeros(logits.shape, dtype=torch.float64) + targets.base[..., None].double()
    for m in range(targets.class_ids.shape[-1]):
        index = targets.class_ids[..., m : m + 1].long()
        q.scatter_add_(-1, index, targets.excess[..., m : m + 1].double())
    cross_entropy = -(q * logits.double().log_softmax(-1)).sum(-1)
    return (targets.weight * cross_entropy).sum() / cross_entropy.numel()


@pytest.mark.parametrize("scale", [1, 30])
def test_loss_and_gradient_equal_those_of_dense_soft_cross_entropy(scale: float) -> None:
    targets = random_targets()
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(B, N, C, generator=generator) * scale).requires_grad_()
    expected = dense_loss(logits, targets)
    (gradient,) = torch.autograd.grad(expected, logits)
    loss = token_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, gradient.float(), rtol=1e-5, atol=1e-7)


def test_loss_on_replayed_targets_of_real_maps_equals_the_dense_one(
    lite0_maps: list[LabelMap],
) -> None:
    crops = image_from_box((0.1, -0.2, 0.8, 0.9)).repeat(12, 1, 1)  # weights 0, 1 and between
    targets = replay(lite0_maps, crops, (7, 7))
    logits = torch.randn(12, 49, 1000, generator=torch.Generator().manual_seed(2))
    for found, part in ((logits, targets), (logits[:, :1], class_target_of(targets))):
        torch.testing.assert_close(
            token_cross_entropy(found, part),
            dense_loss(found, part).float(),
            rtol=1e-6,
            atol=1e-6,
        )


def test_gradcheck() -> None:
    logits = torch.randn(B, N, C, dtype=torch.float64, requires_grad=True)
    targets = random_targets()
    assert torch.autograd.gradcheck(lambda x: token_cross_entropy(x, targets), logits)


def test_half_precision_logits_are_accumulated_in_float32() -> None:
    logits = torch.randn(B, N, C, generator=torch.Generator().manual_seed(3)).bfloat16()
    loss = token_cross_entropy(logits, random_targets())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_cross_entropy(logits.float(), random_targets()))


def test_tokens_of_weight_0_add_nothing_but_are_counted() -> None:
    targets = random_targets()
    logits = torch.randn(B, N, C)
    blind = dataclasses.replace(targets, weight=torch.zeros(B, N))
    assert token_cross_entropy(logits, blind) == 0
    one = blind.weight.clone()
    one[1, 2] = 1
    whole = dataclasses.replace(targets, weight=torch.ones(B, N))
    alone = dataclasses.replace(targets, weight=one)
    per_token = dense_loss(logits[1:2, 2:3], _part(whole, 1, 2)).float()
    torch.testing.assert_close(token_cross_entropy(logits, alone), per_token / (B * N))


def _part(targets: TokenTargets, b: int, n: int) -> TokenTargets:
    return TokenTargets(
        targets.class_ids[b : b + 1, n : n + 1],
        targets.excess[b : b + 1, n : n + 1],
        targets.base[b : b + 1, n : n + 1],
        targets.weight[b : b + 1, n : n + 1],
    )


def test_both_parts_are_weighted() -> None:
    targets = dataclasses.replace(random_targets(), class_target=random_targets(1, seed=4))
    class_logits, token_logits = torch.randn(B, C), torch.randn(B, N, C)
    criterion = TokenLabelLoss(0.3, 0.7)
    class_loss, token_loss = criterion.parts((class_logits, token_logits), targets)
    torch.testing.assert_close(
        class_loss, dense_loss(class_logits[:, None], class_target_of(targets)).float()
    )
    torch.testing.assert_close(token_loss, dense_loss(token_logits, targets).float())
    torch.testing.assert_close(
        criterion((class_logits, token_logits), targets), 0.3 * class_loss + 0.7 * token_loss
    )


@pytest.mark.parametrize(("name", "weights"), [("lvvit", (1.0, 1.0)), ("volo", (1.0, 0.5))])
def test_presets(name: str, weights: tuple[float, float]) -> None:
    criterion = TokenLabelLoss.preset(name)
    assert (criterion.cls_weight, criterion.dense_weight) == weights


def test_what_does_not_fit_is_refused() -> None:
    targets = random_targets()
    with pytest.raises(InvalidTargetsError, match="is the targets' token_grid the student's"):
        token_cross_entropy(torch.zeros(B, N + 1, C), targets)
    with pytest.raises(InvalidTargetsError, match="as many classes as the label store"):
        token_cross_entropy(torch.zeros(B, N, 3), targets)
    with pytest.raises(InvalidTargetsError, match="with a class_target"):
        TokenLabelLoss()((torch.zeros(B, C), torch.zeros(B, N, C)), targets)
    with pytest.raises(SettingsError, match=r"\['lvvit', 'volo'\], got 'deit'"):
        TokenLabelLoss.preset("deit")


def test_logits_of_another_number_of_classes_are_refused(lite0_maps: list[LabelMap]) -> None:
    targets = replay(lite0_maps[:1], torch.eye(3)[None], (2, 2))
    for num_classes in (999, 1200):
        with pytest.raises(InvalidTargetsError, match=f"for 1000 classes, expected {num_classes}"):
            token_cross_entropy(torch.zeros(1, 4, num_classes), targets)
