from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenlabel.annotate import AnnotatorError, DenseAnnotator, Preprocessing
from tokenlabel.annotate.annotator import TimmNetwork
from tokenlabel.annotate.build import AnnotatorSpec, timm_annotator, weights_hash
from tokenlabel.annotate.scores import encode, score
from tokenlabel.storage.encoding import unpack_entries


def dense_scores(annotator: DenseAnnotator, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of every location [B, C, H, W], and the network's own pooled scores [B, C]."""
    network = annotator.network
    with torch.inference_mode():
        features = network.features(images)
        cells = network.locations(features)
        scores = network.classify(cells.flatten(0, 2)).unflatten(0, cells.shape[:3])
        return scores.movedim(-1, 1), network.pooled(features)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


LINEAR_HEADS = [
    ("resnet18", (64, 96), (2, 3)),
    ("efficientnet_b0", (64, 96), (2, 3)),
    ("eca_nfnet_l0", (64, 96), (2, 3)),
    ("regnety_002", (64, 96), (2, 3)),
    ("swin_tiny_patch4_window7_224", (224, 288), (7, 9)),
    ("densenet121", (64, 96), (2, 3)),
    ("hrnet_w18_small", (64, 96), (2, 3)),
]


@pytest.mark.parametrize(("model", "size", "grid"), LINEAR_HEADS)
def test_the_mean_over_locations_is_the_models_own_output(
    model: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    annotator = timm_annotator(model, pretrained=False, img_size=size)
    assert annotator.grid == grid
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1))
    dense, _ = dense_scores(annotator, images)
    network = annotator.network
    assert isinstance(network, TimmNetwork)
    with torch.inference_mode():
        own = network.model(images)
    assert relative_difference(dense.mean(dim=(2, 3)), own) < 1e-4


@pytest.mark.parametrize("model", ["convnext_atto", "mobilenetv3_small_050"])
def test_heads_with_norms_and_activations_see_each_location_as_the_pooled_vector(
    model: str,
) -> None:
    # On a one-cell grid the location is the pooled vector, so the answers must be the same.
    annotator = timm_annotator(model, pretrained=False, img_size=(32, 32))
    assert annotator.grid == (1, 1)
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    dense, own = dense_scores(annotator, images)
    assert relative_difference(dense[:, :, 0, 0], own) < 1e-5


def test_token_models_are_read_by_rows_and_columns() -> None:
    annotator = timm_annotator("vit_tiny_patch16_224", pretrained=False, img_size=(64, 96))
    assert annotator.grid == (4, 6)
    assert any("does not pool by averaging" in note for note in annotator.notes)
    images = torch.randn((1, 3, 64, 96), generator=torch.Generator().manual_seed(1))
    network = annotator.network
    with torch.inference_mode():
        features = network.features(images)
        cells = network.locations(features)
        # row 2, column 1 is token 1 + 2 * 6 + 1: one class token comes first
        assert torch.equal(cells[0, 2, 1, 0], features[0, 14])
        single = network.classify(cells[:, 2, 1])
        assert isinstance(network, TimmNetwork)
        assert torch.allclose(single, network.model.head(features[:, 14]), atol=1e-6)


def test_average_pooled_token_models_pass_the_check() -> None:
    annotator = timm_annotator("vit_base_patch16_rpn_224", pretrained=False, img_size=(64, 64))
    assert annotator.notes == [
        "vit_base_patch16_rpn_224 has random weights; its labels mean nothing"
    ]


def test_class_tokens_that_a_model_does_not_count_are_found() -> None:
    annotator = timm_annotator("volo_d1_224", pretrained=False)
    assert annotator.grid == (14, 14)
    features = annotator.network.features(torch.zeros(1, 3, 224, 224))
    assert torch.equal(annotator.network.locations(features)[0, 0, 0, 0], features[0, 1])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("pit_ti_224", "1 tokens, 1 of them class tokens, form no grid"),  # gives no other
        ("vgg11", "head's answer to the average location differs"),  # its head is 7x7 wide
        ("crossvit_9_240", "expected a tensor"),  # gives two sets of tokens
        ("eva02_tiny_patch14_224", "needs 2 to 16777216 classes, this one has 0"),
        ("resnet18.no_such_tag", "no_such_tag"),
    ],
)
def test_models_that_cannot_be_run_densely_are_refused_by_name(model: str, reason: str) -> None:
    with pytest.raises(AnnotatorError, match=reason):
        timm_annotator(model, pretrained=False)


def test_faults_of_a_users_network_are_one_line() -> None:
    def fn(images: Tensor) -> Tensor:
        raise ValueError(f"what is {images.shape}?")

    with pytest.raises(AnnotatorError, match=r"cannot be run densely .*ValueError: what is"):
        DenseAnnotator.from_callable(fn, Preprocessing((8, 8)), 4)


class _Shifted(nn.Module):
    """A network whose dense answer is not what it pools."""

    num_classes = 7

    def forward_features(self, images: Tensor) -> Tensor:
        return images[:, :1, ::16, ::16].repeat(1, 7, 1, 1) + torch.arange(7.0).view(1, 7, 1, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        return features[:, :, 0, 0]  # a corner, where an average is expected


def test_a_model_that_is_not_its_own_mean_is_refused() -> None:
    with pytest.raises(AnnotatorError, match="differs from the model's own output"):
        DenseAnnotator(
            TimmNetwork(_Shifted(), (64, 64)),
            Preprocessing((64, 64)),
            7,
            {"kind": "timm", "model": "shifted"},
        )


def test_an_unknown_model_names_what_comes_close() -> None:
    with pytest.raises(AnnotatorError, match=r"no model 'resnet5O'; did you mean .*resnet"):
        timm_annotator("resnet5O")


def test_a_checkpoint_decides_the_number_of_classes(tmp_path: Path) -> None:
    trained = timm_annotator("test_efficientnet", pretrained=False)
    assert isinstance(trained.network, TimmNetwork)
    trained.network.model.reset_classifier(10)
    path = tmp_path / "mine.safetensors"
    save_file(trained.network.model.state_dict(), path)
    annotator = timm_annotator("test_efficientnet", checkpoint=path)
    assert annotator.num_classes == 10
    assert annotator.class_names is None
    assert isinstance(annotator.network, TimmNetwork)
    assert weights_hash(annotator.network.model) == weights_hash(trained.network.model)


def test_a_checkpoint_of_timms_trainer_loads_without_unpickling_code(tmp_path: Path) -> None:
    import argparse

    trained = timm_annotator("test_efficientnet", pretrained=False)
    assert isinstance(trained.network, TimmNetwork)
    weights = {f"module.{k}": v for k, v in trained.network.model.state_dict().items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": weights}, path)
    assert timm_annotator("test_efficientnet", checkpoint=path).num_classes == 1000


def test_checkpoints_that_do_not_fit_say_where(tmp_path: Path, lite0_checkpoint: Path) -> None:
    with pytest.raises(AnnotatorError, match=r"does not fit resnet18: .*unknown to it.* more"):
        timm_annotator("resnet18", checkpoint=lite0_checkpoint)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(lite0_checkpoint.read_bytes()[:5000])
    with pytest.raises(AnnotatorError, match=r"damaged.safetensors: not a checkpoint"):
        timm_annotator("tf_efficientnet_lite0", checkpoint=damaged)
    with pytest.raises(AnnotatorError, match="no such checkpoint"):
        timm_annotator("tf_efficientnet_lite0", checkpoint=tmp_path / "none.pth")
    code = tmp_path / "code.pth"
    torch.save({"state_dict": nn.Linear(2, 2)}, code)  # an object, not weights
    with pytest.raises(AnnotatorError, match="not a checkpoint"):
        timm_annotator("tf_efficientnet_lite0", checkpoint=code)


def test_random_weights_are_the_same_everywhere() -> None:
    first = AnnotatorSpec("test_efficientnet", pretrained=False).build()
    torch.manual_seed(99)
    second = AnnotatorSpec("test_efficientnet", pretrained=False).build()
    assert first.describe() == second.describe()
    assert any("random weights" in note for note in first.notes)


def test_factories_and_their_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_annotators.py").write_text(
        "import torch\n"
        "from tokenlabel.annotate import DenseAnnotator, Preprocessing\n"
        "def good():\n"
        "    return DenseAnnotator.from_callable(\n"
        "        lambda x: x.mean(1, keepdim=True).repeat(1, 4, 1, 1), Preprocessing((8, 8)), 4)\n"
        "def wrong():\n"
        "    return torch.nn.Identity()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert AnnotatorSpec("my_annotators:good").build().grid == (8, 8)
    with pytest.raises(AnnotatorError, match="returned Identity, expected a DenseAnnotator"):
        AnnotatorSpec("my_annotators:wrong").build()
    with pytest.raises(AnnotatorError, match="no_such_module"):
        AnnotatorSpec("no_such_module:f").build()


def test_callables_must_give_the_classes_they_promise() -> None:
    with pytest.raises(AnnotatorError, match="expected scores of 4 classes"):
        DenseAnnotator.from_callable(lambda x: x, Preprocessing((8, 8)), 4)


def test_input_off_the_models_stride_is_pointed_out() -> None:
    annotator = timm_annotator("resnet18", pretrained=False, img_size=(80, 80))
    assert any("no multiple" in note for note in annotator.notes)


def fixed_scores(logits: Tensor) -> DenseAnnotator:
    """An annotator that answers every image with the given scores [C, H, W]."""

    def fn(images: Tensor) -> Tensor:
        return logits.expand(len(images), *logits.shape)

    return DenseAnnotator.from_callable(fn, Preprocessing((16, 16)), len(logits))


def test_full_and_rounding_divergence_equal_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((50, 3, 4), generator=generator)
    annotator = fixed_scores(logits)
    scores = score(annotator, torch.zeros(2, 3, 16, 16), top_k=5)
    batch = encode(scores, 50, 0.2)
    p = logits.double().softmax(dim=0).numpy()
    ids, steps = unpack_entries(batch.entries[0])
    gain = np.expm1(0.2 * steps.astype(float))
    base = 1 / (50 + gain.sum(axis=0))
    q = np.tile(base, (50, 1, 1))
    truncated = np.empty_like(p)
    for r in range(3):
        for c in range(4):
            q[ids[:, r, c], r, c] += (gain * base)[:, r, c] * (steps[:, r, c] > 0)
            top = np.argsort(-p[:, r, c])[:5]
            truncated[:, r, c] = (1 - p[top, r, c].sum()) / 45
            truncated[top, r, c] = p[top, r, c]
    full = (p * np.log(p / q)).sum(axis=0).mean()
    rounding = (truncated * np.log(truncated / q)).sum(axis=0).mean()
    assert batch.kl_full[1] == pytest.approx(full, rel=1e-5)
    assert batch.kl_quantization[1] == pytest.approx(rounding, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("peak", [30.0, 1e4, float("inf")])
def test_certain_annotators_stay_finite(peak: float) -> None:
    logits = torch.zeros((6, 2, 2))
    logits[3] = peak if peak != float("inf") else 0.0
    if peak == float("inf"):
        logits[[0, 1, 2, 4, 5]] = -peak  # scores that rule all others out
    batch = encode(score(fixed_scores(logits), torch.zeros(1, 3, 16, 16), top_k=5), 6, 0.2)
    ids, steps = unpack_entries(batch.entries[0])
    assert (ids[0] == 3).all()
    assert (steps[0] > 100).all()
    assert (steps[1:] == 0).all()
    assert np.isfinite(batch.kl_full).all()
    assert np.isfinite(batch.kl_quantization).all()
    assert (np.abs(batch.kl_full) < 1e-5).all()
