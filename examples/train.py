"""Train a small ViT on replayed token labels, from scratch.

    python examples/train.py IMAGES STORE [--steps 60] [--model vit_tiny_patch16_224]

Every step sees new random crops and flips; the labels follow them. The loss is measured before
and after on crops of its own.
"""

import argparse
import itertools
import time
from collections.abc import Iterator

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
from tokenlabel.storage import open_store


def batches(
    dataset: TokenLabelDataset, collate: TokenLabelCollate, count: int, seed: int
) -> Iterator[TokenLabelBatch]:
    """Some batches that depend on the seed alone, epoch after epoch."""
    torch.manual_seed(seed)
    loader = DataLoader(dataset, batch_size=20, shuffle=True, collate_fn=collate)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    yield from itertools.islice(epochs, count)


def main() -> None:
    """Train, and say what it brought."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("store")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    store = open_store(arguments.store)
    size = arguments.img_size
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.25, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    torch.manual_seed(0)
    network = timm.create_model(
        arguments.model,
        img_size=size,
        num_classes=store.manifest.settings.num_classes,
    )
    student = TokenLabelStudent(network, (3, size, size))
    dataset = TokenLabelDataset(arguments.images, store, transform)
    collate = TokenLabelCollate(student.token_grid)
    criterion = TokenLabelLoss()
    held_out = list(batches(dataset, collate, count=4, seed=1))

    @torch.no_grad()
    def evaluate() -> tuple[float, float, float]:
        """Class loss, token loss, share of tokens whose best class is their target's."""
        parts = torch.zeros(3)
        for images, targets, _ in held_out:
            outputs = student(images)
            best = targets.dense(outputs[1].shape[-1]).argmax(dim=-1)
            agreement = (outputs[1].argmax(dim=-1) == best).float().mean()
            parts += torch.stack([*criterion.parts(outputs, targets), agreement])
        cls_loss, token_loss, agreement = (parts / len(held_out)).tolist()
        return cls_loss, token_loss, agreement

    student.train()  # the token head answers in training mode; this network has no dropout
    before = evaluate()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.05)
    start = time.monotonic()
    for step, (images, targets, _) in enumerate(
        batches(dataset, collate, arguments.steps, seed=2), start=1
    ):
        loss = criterion(student(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    after = evaluate()
    print(f"{arguments.steps} steps in {time.monotonic() - start:.1f} s, on held-out crops:")
    for name, old, new in zip(
        ("class loss", "token loss", "agreement"), before, after, strict=True
    ):
        print(f"  {name:10s}  {old:.3f} before, {new:.3f} after")


if __name__ == "__main__":
    main()
