"""The whole road on real input: photographs -> label store -> a look into it -> a student.

    python examples/demo.py OUT

Annotates the photographs beside this file with a small ImageNet classifier, through Ray on this
machine, draws labels over images, and trains a small ViT on them for some steps. Every command is
shown, so that each can be tried by hand.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
PHOTOS = EXAMPLES / "photos"


def run(*command: str | Path) -> None:
    """Run one command as a user would, and say how long it took."""
    print(f"\n$ {shlex.join(str(word) for word in command)}", flush=True)
    program = [sys.executable]
    if command[0] == "tokenlabel":
        program += ["-m", "tokenlabel.cli"]
    start = time.monotonic()
    subprocess.run([*program, *command[1:]], check=True)
    print(f"({time.monotonic() - start:.1f} s)", flush=True)


def main(out: Path) -> None:
    """Annotate, verify, look, train."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    weights, labels = out / "lite0.safetensors", out / "labels"
    run("python", EXAMPLES / "lite0_weights.py", weights)
    run(
        *("tokenlabel", "annotate", PHOTOS, labels, "--model", "tf_efficientnet_lite0"),
        *("--checkpoint", weights, "--img-size", "288"),
        *("--batch-size", "4", "--shard-size", "8", "--workers", "2"),
    )
    run("tokenlabel", "verify", labels, "--source", PHOTOS)
    run("tokenlabel", "info", labels)
    run("tokenlabel", "inspect", labels, "chelsea.jpg")
    run("tokenlabel", "inspect", labels, "chelsea.jpg", "--cell", "4,5")
    region, crop = out / "coffee.png", out / "coffee_crop.png"
    picture = ("tokenlabel", "inspect", labels, "coffee.jpg", "--image", PHOTOS)
    run(*picture, "--png", region)
    run(*picture, "--png", crop, "--crop", "0.25,0.25,1,1", "--flip")
    run("python", EXAMPLES / "train.py", PHOTOS, labels)
    print(f"\nThe label store is {labels}, the annotator's weights are {weights}.")
    print(f"Pictures: {region} (labelled regions), {crop} (a crop and its replayed targets).")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
