"""The dense annotator: a classifier run so that it answers at every location.

A timm classifier computes its feature map, and then timm's own `forward_head` is given every
location as if it were the pooled vector. That is exact for any head, where a classifier copied
into a 1x1 convolution is right only for heads that are pooling followed by one linear layer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from ..storage.encoding import MAX_CLASSES
from .errors import AnnotatorError

__all__ = ["DenseAnnotator", "DenseNetwork", "Preprocessing", "TimmNetwork"]

_PROBE_IMAGES = 2
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the annotator's input.

    Attributes:
        input_size: (height, width) in pixels.
        mean: per RGB channel, for pixels in [0, 1].
        std: likewise.
        interpolation: name of a Pillow filter: "bilinear", "bicubic", "lanczos", ...
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"


class DenseNetwork(Protocol):
    """What `DenseAnnotator` runs. `D...` is whatever one location looks like to the network."""

    def features(self, images: Tensor) -> Tensor:
        """Features of normalised images [B, 3, height, width]."""
        ...

    def locations(self, features: Tensor) -> Tensor:
        """The features by location: [B, H, W, D...]."""
        ...

    def classify(self, vectors: Tensor) -> Tensor:
        """Scores (logits) [n, C] of n locations [n, D...]."""
        ...

    def pooled(self, features: Tensor) -> Tensor:
        """The network's own scores [B, C] for whole images."""
        ...


class TimmNetwork(nn.Module):
    """A timm classifier as a dense network: NCHW, NHWC or token features."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.model: Any = model  # timm's models share names, not a type
        self._input_size = input_size

    def features(self, images: Tensor) -> Tensor:
        """Timm's `forward_features`."""
        features = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in {3, 4}:
            raise AnnotatorError(
                f"{type(self.model).__name__}: forward_features gave "
                f"{getattr(features, 'shape', type(features).__name__)}; "
                "expected a tensor [B, C, H, W], [B, H, W, C] or [B, N, C]"
            )
        return features

    def locations(self, features: Tensor) -> Tensor:
        """[B, H, W, C, 1, 1] (NCHW), [B, H, W, 1, 1, C] (NHWC), [B, H, W, prefix + 1, C]."""
        if features.ndim == 3:
            return self._token_locations(features)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            return features[:, :, :, None, None, :]
        return features.permute(0, 2, 3, 1)[..., None, None]

    def _token_locations(self, features: Tensor) -> Tensor:
        batch, tokens, channels = features.shape
        prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        grid = _token_grid(self.model, tokens - prefix, self._input_size)
        if grid is None and prefix == 0 and getattr(self.model, "cls_token", None) is not None:
            prefix = 1  # VOLO and CoaT have a class token and do not count it
            grid = _token_grid(self.model, tokens - prefix, self._input_size)
        if grid is None:
            raise AnnotatorError(
                f"{type(self.model).__name__}: {tokens} tokens, {prefix} of them class tokens, "
                f"form no grid on input {self._input_size[0]}x{self._input_size[1]}; wrap the "
                "network with DenseAnnotator.from_callable and name it by --model module:factory"
            )
        patches = features[:, prefix:].reshape(batch, *grid, 1, channels)
        # The head may pool by the first token, by the mean of those after the prefix or by
        # attention: over copies of one token each of them gives that token.
        return patches.expand(batch, *grid, prefix + 1, channels)

    def classify(self, vectors: Tensor) -> Tensor:
        """Timm's `forward_head` on single locations."""
        return cast("Tensor", self.model.forward_head(vectors)).reshape(len(vectors), -1)

    def pooled(self, features: Tensor) -> Tensor:
        """Timm's `forward_head`."""
        return cast("Tensor", self.model.forward_head(features))

    def averages(self) -> bool:
        """Whether the model pools by the mean over locations, as far as it says."""
        for owner in (self.model, getattr(self.model, "head", None)):
            pool = getattr(owner, "global_pool", None)
            kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
            if isinstance(kind, str) and kind:
                return kind in {"avg", "fast", "fastavg"}
        return True


class _CallableNetwork(nn.Module):
    """Any function images -> scores [B, C, H, W] as a dense network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function  # registered as a submodule where it is one

    def features(self, images: Tensor) -> Tensor:
        return self.function(images)

    def locations(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)

    def classify(self, vectors: Tensor) -> Tensor:
        return vectors

    def pooled(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))


@dataclass
class DenseAnnotator:
    """Anything that scores classes at every location of an image.

    Made by `tokenlabel.annotate.build.timm_annotator` or `DenseAnnotator.from_callable`.

    Attributes:
        network: the module that is run.
        preprocessing: what it expects of its input.
        num_classes: C.
        identity: what it is, for the manifest; plain JSON values.
        class_names: C names, or None.
        grid: (H, W) of its score map, found by running it.
        notes: what a user should know about it.
    """

    network: DenseNetwork
    preprocessing: Preprocessing
    num_classes: int
    identity: dict[str, Any]
    class_names: list[str] | None = None
    grid: tuple[int, int] = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise AnnotatorError(
                f"{self.name}: an annotator needs 2 to {MAX_CLASSES} classes, this one has "
                f"{self.num_classes}; take a model with a classifier, or weights that bring one"
            )
        if len(self.class_names or []) not in {0, self.num_classes}:
            raise AnnotatorError(
                f"{self.name}: {len(self.class_names or [])} class names for "
                f"{self.num_classes} classes"
            )
        if isinstance(self.network, nn.Module):
            self.network.eval()
        self._probe()

    @classmethod
    def from_callable(
        cls,
        fn: Callable[[Tensor], Tensor],
        preprocess: Preprocessing,
        num_classes: int,
        class_names: list[str] | None = None,
    ) -> Self:
        """Bring your own network.

        Args:
            fn: normalised images float32 [B, 3, height, width] -> scores [B, C, H, W]; scores
                are logits, a softmax over C makes them the distribution of a cell. A module is
                moved to the device, put in eval mode, and its weights enter the fingerprint.
            preprocess: what `fn` expects of its input.
            num_classes: C.
            class_names: C names, if there are any.

        Raises:
            AnnotatorError: `fn` does not give [B, C, H, W].
        """
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        module = getattr(fn, "__module__", type(fn).__module__)
        identity = {"kind": "callable", "name": f"{module}.{name}"}
        return cls(_CallableNetwork(fn), preprocess, num_classes, identity, class_names)

    def describe(self) -> dict[str, Any]:
        """The identity with preprocessing, for the manifest; plain JSON values."""
        preprocessing = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.preprocessing).items()
        }
        return {**self.identity, "preprocessing": preprocessing}

    def to(self, device: torch.device) -> None:
        """Move the network to a device, its convolutions to channels-last."""
        if isinstance(self.network, nn.Module):
            # torch's stubs know `memory_format` only without a device
            self.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.identity.get("model") or self.identity["name"])

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find the grid, and hold the dense answer against the pooled one."""
        height, width = self.preprocessing.input_size
        noise = torch.Generator().manual_seed(0)
        images = torch.randn((_PROBE_IMAGES, 3, height, width), generator=noise)
        try:
            features = self.network.features(images)
            cells = self.network.locations(features)
            self.grid = (cells.shape[1], cells.shape[2])
            scores = self.network.classify(cells.flatten(0, 2))
            if cells.shape[0] != _PROBE_IMAGES or scores.shape[1:] != (self.num_classes,):
                raise AnnotatorError(
                    f"{self.name}: expected scores of {self.num_classes} classes, [B, C, H, W]; "
                    f"got scores {tuple(scores.shape)} from features {tuple(features.shape)}"
                )
            if isinstance(self.network, TimmNetwork):
                self._check_head(self.network, features, cells, scores)
        except AnnotatorError:
            raise
        except Exception as error:
            raise AnnotatorError(
                f"{self.name}: cannot be run densely on input of {height}x{width} pixels: "
                f"{type(error).__name__}: {error}"
            ) from error
        if height % self.grid[0] or width % self.grid[1]:
            self.notes.append(
                f"input {height}x{width} is no multiple of the {self.grid[0]}x{self.grid[1]} "
                "grid; cells lie up to half a cell off. Choose a multiple of the model's stride"
            )

    def _check_head(
        self, network: TimmNetwork, features: Tensor, cells: Tensor, scores: Tensor
    ) -> None:
        """Where a network pools by averaging, its dense and its own answer must be tied.

        Its head, given the average location, must answer what the network answers. For a linear
        head that is the mean over the locations' scores.
        """
        if not network.averages():
            self.notes.append(
                f"{self.name} does not pool by averaging its locations, so nothing ties its dense "
                "scores to its own output; look at a few maps before trusting them"
            )
            return
        average = network.classify(cells.flatten(1, 2).mean(dim=1))
        middle = network.classify((cells[0, 0, :1] + cells[1, -1, -1:]) / 2)
        is_linear = _relative_difference(middle, (scores[:1] + scores[-1:]) / 2) <= _TOLERANCE
        if is_linear:
            average = scores.reshape(_PROBE_IMAGES, -1, self.num_classes).mean(dim=1)
        difference = _relative_difference(average, network.pooled(features))
        if not difference <= _TOLERANCE:
            what = "mean over locations" if is_linear else "head's answer to the average location"
            raise AnnotatorError(
                f"{self.name}: the {what} differs from the model's own output by "
                f"{difference:.2g} (at most {_TOLERANCE:g} is allowed), so it cannot be run "
                "densely as it is; wrap it with DenseAnnotator.from_callable"
            )


def _relative_difference(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().clamp_min(1e-6)
    return float((a - b).abs().max() / scale)


def _token_grid(model: Any, tokens: int, input_size: tuple[int, int]) -> tuple[int, int] | None:  # noqa: ANN401 - timm's models share no type
    """(H, W) of a model's tokens; None where they form no grid of the input's shape."""
    if tokens < 2:
        return None  # a single token is a class token, such as PiT's, and no map
    stated = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if stated is not None and stated[0] * stated[1] == tokens:
        return int(stated[0]), int(stated[1])
    height, width = input_size
    rows = round((tokens * height / width) ** 0.5)
    columns = round(rows * width / height)
    return (rows, columns) if rows * columns == tokens else None
