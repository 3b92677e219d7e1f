"""How much of the bare model's speed is left when images are really annotated.

    python benchmarks/annotate.py [--images DIR] [--model resnet50] [--rounds 5]

Both sides run in this process and in turn: the bare model over batches that lie ready in memory,
and `annotate` over image files, with decoding, ranking, encoding and committing. Weights are
random, as speed does not depend on them. The last line is one JSON object: `efficiency` is
annotate's images/s over the bare model's, medians of the rounds; `stages` are the shares of the
threads' time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import timm
import torch

from tokenlabel.annotate import ImageFiles, ImageFolder, Summary, annotate

PHOTOS = Path(__file__).resolve().parent.parent / "examples" / "photos"


def files(folder: Path, count: int) -> ImageFiles:
    """So many images, the folder's over and over, under keys of their own."""
    keys = [key for key, _ in ImageFolder(folder).samples()]
    return ImageFiles(
        [(f"{n}/{keys[n % len(keys)]}", folder / keys[n % len(keys)]) for n in range(count)]
    )


def bare_rate(model: str, size: int, batch_size: int, count: int, device: str) -> float:
    """Images a second of `model(x)` alone."""
    network = timm.create_model(model).eval()
    # torch's stubs know `memory_format` only without a device
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch_size, 3, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(x)
        start = time.perf_counter()
        for _ in range(count // batch_size):
            network(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=PHOTOS)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, size, batch_size = arguments.model, arguments.img_size, arguments.batch_size
    count = arguments.count // batch_size * batch_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = files(arguments.images, count)
    bare: list[float] = []
    ours: list[float] = []
    stages: Counter[str] = Counter()
    for number in range(arguments.rounds):
        bare.append(bare_rate(model, size, batch_size, count, device))
        with tempfile.TemporaryDirectory() as out:
            done: Summary = annotate(
                source,
                Path(out) / "labels",
                model=model,
                pretrained=False,
                img_size=size,
                batch_size=batch_size,
                amp="none",
                workers=0,
            )
        ours.append(done.labelled / done.seconds)
        stages.update(done.stages)
        print(f"round {number + 1}: bare {bare[-1]:.2f}, annotate {ours[-1]:.2f} images/s")
    total = sum(stages.values())
    result = {
        "efficiency": round(statistics.median(ours) / statistics.median(bare), 3),
        "bare_images_per_second": round(statistics.median(bare), 2),
        "annotate_images_per_second": round(statistics.median(ours), 2),
        "stages": {name: round(spent / total, 4) for name, spent in stages.items()},
        "device": device,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
