"""Students: timm networks that say a class for every token, not only for the image.

Wraps a network as it is and adds one linear layer. Which targets the tokens get, and how they are
compared, is the business of `replay` and `loss`.
"""

from typing import cast

import torch
from torch import Tensor, nn

from .errors import InvalidTargetsError, UnsupportedModelError

__all__ = ["TokenLabelStudent"]


class _Classifier(nn.Module):
    """What timm's classifiers have in common; names for the type checker, never run."""

    num_classes: int
    num_features: int

    def forward_features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class TokenLabelStudent(nn.Module):
    """A timm network with a token head.

    Works with networks whose `forward_features` gives tokens [B, prefix + N, D] in row-major
    order (ViT, DeiT, BEiT, EVA, CaiT, ...) or a feature map [B, h, w, D] or [B, D, h, w] (Swin,
    ConvNeXt, ResNet, ...). Class logits come from the network's own `forward_head`.

    Args:
        model: the network, with a classifier; it is kept as `model`, its weights as they are.
        input_size: (channels, height, width) of the images; by default what the network was built
            for, or else its `pretrained_cfg`.

    Attributes:
        model: the network.
        token_head: the linear layer from D features to C classes.

    Raises:
        UnsupportedModelError: no such network.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        name = type(model).__name__
        for needed in ("forward_features", "forward_head", "num_features", "num_classes"):
            if not hasattr(model, needed):
                raise UnsupportedModelError(
                    f"expected a timm classifier, but {name} has no `{needed}`"
                )
        self.model = cast("_Classifier", model)
        if self.model.num_classes < 1:
            raise UnsupportedModelError(
                f"expected a network with a classifier, but this {name} has num_classes="
                f"{self.model.num_classes}: create it with num_classes=C of the label store"
            )
        self._prefix = getattr(model, "num_prefix_tokens", 0)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._input_size = input_size or _built_for(model)
        self._token_grid = self._probe(self._input_size)
        self.token_head = nn.Linear(self.model.num_features, self.model.num_classes)
        nn.init.trunc_normal_(self.token_head.weight, std=0.02)
        nn.init.zeros_(self.token_head.bias)
        self.token_head.to(next(model.parameters()))

    @property
    def token_grid(self) -> tuple[int, int]:
        """(h, w) of the tokens, the `token_grid` of `replay`."""
        return self._token_grid

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Class logits, and in training the token logits.

        Args:
            images: [B, channels, height, width].

        Returns:
            In training (class logits [B, C], token logits [B, N, C]), N = h * w in row-major
            order. In evaluation the class logits alone, as the bare network gives them.

        Raises:
            InvalidTargetsError: in training, the images do not give h * w tokens.
        """
        if self.training and images.shape[1:] != self._input_size:
            raise InvalidTargetsError(
                f"expected images of {self._input_size}, for {self.token_grid} tokens, got "
                f"{tuple(images.shape[1:])}: pass their size as input_size"
            )
        features = self.model.forward_features(images)
        class_logits = self.model.forward_head(features)
        if not self.training:
            return class_logits
        tokens = self._tokens(features)
        h, w = self.token_grid
        if tokens.shape[1] != h * w:
            raise InvalidTargetsError(
                f"expected {h} x {w} tokens, got {tokens.shape[1]} from images "
                f"{tuple(images.shape)}: pass their size as input_size, and do not drop patches"
            )
        return class_logits, self.token_head(tokens)

    def _tokens(self, features: Tensor) -> Tensor:
        """[B, N, D]."""
        if features.ndim == 3:
            return features[:, self._prefix :]
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).mT

    def _probe(self, input_size: tuple[int, int, int]) -> tuple[int, int]:
        """Find the token grid by looking at the features of one blank image."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            weight = next(self.model.parameters())
            features = self.model.forward_features(weight.new_zeros(1, *input_size))
        self.model.train(was_training)
        shape = tuple(features.shape)
        depth = self.model.num_features
        if len(shape) == 4 and shape[3 if self._channels_last else 1] == depth:
            return shape[1:3] if self._channels_last else shape[2:4]
        grid_of = getattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size", None)
        if len(shape) == 3 and grid_of is not None:
            h, w = grid_of(input_size[1:])
            if shape == (1, self._prefix + h * w, depth):
                return h, w
        raise UnsupportedModelError(
            f"expected features [B, prefix + h * w, {depth}] with a patch_embed that knows (h, w), "
            f"or a feature map of depth {depth}, but {type(self.model).__name__} gives {shape} "
            f"for an image {input_size}"
        )


def _built_for(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = config.get("input_size", (3, 224, 224))
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    return channels, height, width
