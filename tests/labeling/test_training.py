from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tokenlabel.labeling import (
    TokenLabelBatch,
    TokenLabelCollate,
    TokenLabelDataset,
    TokenLabelLoss,
    TokenLabelStudent,
)

SIZE = 64


def test_a_vit_learns_the_replayed_labels_of_real_photographs(
    photos: Path, photo_store: Path
) -> None:
    torch.manual_seed(0)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, num_classes=1000, depth=4, embed_dim=192
    )
    student = TokenLabelStudent(network, (3, SIZE, SIZE)).train()
    dataset = TokenLabelDataset(photos, photo_store, transform)
    loader: DataLoader[TokenLabelBatch] = DataLoader(
        dataset,  # type: ignore[arg-type] # batches are what its collate function makes
        batch_size=20,
        shuffle=True,
        collate_fn=TokenLabelCollate(student.token_grid),
    )
    criterion = TokenLabelLoss()
    held_out = [batch for _ in range(3) for batch in loader]

    @torch.no_grad()
    def token_loss_and_agreement() -> tuple[float, float]:
        losses, agreements = [], []
        for images, targets, _ in held_out:
            class_logits, token_logits = student(images)
            losses.append(criterion.parts((class_logits, token_logits), targets)[1])
            best = targets.dense(1000).argmax(dim=-1)
            agreements.append((token_logits.argmax(dim=-1) == best).float().mean())
        return float(torch.stack(losses).mean()), float(torch.stack(agreements).mean())

    loss_before, agreement_before = token_loss_and_agreement()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(60):
        for images, targets, _ in loader:
            optimizer.zero_grad()
            criterion(student(images), targets).backward()
            optimizer.step()
    loss_after, agreement_after = token_loss_and_agreement()
    assert loss_after < loss_before - 1.5
    assert agreement_after > agreement_before + 0.2
