"""Building an annotator from what a user names: a timm model, a checkpoint, a factory.

Workers build their own from the same `AnnotatorSpec` and compare the hash of their weights with
the plan's, so that a cluster cannot label one data set with two networks.
"""

import argparse
import difflib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from ..storage.errors import SettingsError
from .annotator import DenseAnnotator, Preprocessing, TimmNetwork
from .errors import AnnotatorError

__all__ = ["AnnotatorSpec", "timm_annotator", "weights_hash"]


@dataclass(frozen=True)
class AnnotatorSpec:
    """What it takes to build an annotator anywhere.

    Attributes:
        model: a timm model name, `package.module:factory` where the factory takes no arguments
            and returns a `DenseAnnotator`, or an annotator that is already built.
        checkpoint: local weights for a timm model, safetensors or torch.
        pretrained: fetch timm's weights where there is no checkpoint.
        img_size: (height, width) of a timm model's input; None for the model's own.
        class_names: names of the classes, in place of those the annotator knows.
    """

    model: str | DenseAnnotator
    checkpoint: Path | None = None
    pretrained: bool = True
    img_size: tuple[int, int] | None = None
    class_names: list[str] | None = None

    def build(self) -> DenseAnnotator:
        """Build the annotator, on the CPU, with the hash of its weights in its identity.

        Raises:
            AnnotatorError: it cannot be built; the message says which part and what to do.
            SettingsError: settings that contradict each other.
        """
        if isinstance(self.model, str) and ":" not in self.model:
            annotator = timm_annotator(
                self.model,
                checkpoint=self.checkpoint,
                pretrained=self.pretrained,
                img_size=self.img_size,
            )
        else:
            if self.checkpoint or self.img_size:
                raise SettingsError(
                    "a checkpoint and an image size are for timm models; "
                    f"{self.model} brings its own weights and preprocessing"
                )
            annotator = _from_factory(self.model) if isinstance(self.model, str) else self.model
        if isinstance(annotator.network, nn.Module):
            annotator.identity["weights_sha256"] = weights_hash(annotator.network)
        if self.class_names is not None:
            if len(self.class_names) != annotator.num_classes:
                raise SettingsError(
                    f"{len(self.class_names)} class names for {annotator.num_classes} classes; "
                    "give one name for each class the annotator scores"
                )
            annotator.class_names = self.class_names
        return annotator


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def timm_annotator(
    model: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    img_size: tuple[int, int] | None = None,
) -> DenseAnnotator:
    """Run a timm classifier densely.

    Preprocessing comes from the model's `pretrained_cfg`. A checkpoint with another number of
    classes decides how many the model gets.

    Args:
        model: timm's name of it.
        checkpoint: local weights; timm's are not fetched then.
        pretrained: fetch timm's weights. Without them and without a checkpoint the weights are
            random, from a fixed seed.
        img_size: (height, width) of the input; None for the size the model was tested at.

    Raises:
        AnnotatorError: unknown model, weights that cannot be had or do not fit, or a model that
            cannot be run densely.
    """
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(pretrained=True), n=3)
        close = close or difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise AnnotatorError(f"timm has no model {model!r}; {hint}")
    weights = _read_checkpoint(Path(checkpoint)) if checkpoint else None
    pretrained = pretrained and weights is None
    try:
        known = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # a known model, an unknown tag
        raise AnnotatorError(f"{model}: {_one_line(error)}") from error
    options: dict[str, Any] = {}
    if weights is not None and known is not None:
        options["num_classes"] = _classes_of(weights, known.classifier)
    if img_size is not None and known is not None and known.fixed_input_size:
        options["img_size"] = img_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that random weights are the same in every worker
        try:
            network: Any = timm.create_model(model, pretrained=pretrained, **options)
        except Exception as error:
            what = "fetch the pretrained weights of" if pretrained else "build"
            hint = "; give --checkpoint FILE or --no-pretrained" if pretrained else ""
            raise AnnotatorError(f"cannot {what} {model}: {_one_line(error)}{hint}") from error
    if weights is not None:
        _load_weights(network, weights, f"{checkpoint} does not fit {model}")
    data = resolve_data_config(model=network, use_test_size=True)
    preprocessing = Preprocessing(
        img_size or data["input_size"][1:],
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
    )
    annotator = DenseAnnotator(
        TimmNetwork(network, preprocessing.input_size),
        preprocessing,
        network.num_classes,
        {"kind": "timm", "model": model},
        _imagenet_names(network.num_classes),
    )
    if weights is None and not pretrained:
        annotator.notes.append(f"{model} has random weights; its labels mean nothing")
    return annotator


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AnnotatorError(f"{path}: no such checkpoint")
    try:
        # timm's trainer puts its parsed arguments beside the weights: a plain holder of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = load_state_dict(str(path), use_ema=True, weights_only=True)
    except Exception as error:
        raise AnnotatorError(
            f"{path}: not a checkpoint (safetensors, or torch with weights only): "
            f"{_one_line(error)}"
        ) from error
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise AnnotatorError(f"{path}: the checkpoint holds no weights")
    return tensors


def _classes_of(weights: dict[str, Tensor], classifier: str | Iterable[str] | None) -> int | None:
    names = [classifier] if isinstance(classifier, str) else list(classifier or [])
    for name in names:
        if f"{name}.weight" in weights:
            return len(weights[f"{name}.weight"])
    return None


def _load_weights(network: nn.Module, weights: dict[str, Tensor], failure: str) -> None:
    expected = network.state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    faults += [f"{name} is unknown to it" for name in weights.keys() - expected.keys()]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & weights.keys()
        if weights[name].shape != expected[name].shape
    ]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise AnnotatorError(f"{failure}: {', '.join(sorted(faults)[:3])}{more}")
    network.load_state_dict(weights)


def _imagenet_names(num_classes: int) -> list[str] | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    names = [info.index_to_description(index) for index in range(num_classes)]
    return [name.split(",")[0] for name in names]


def _from_factory(name: str) -> DenseAnnotator:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a factory usually lies beside the user's work
    try:
        annotator = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:
        raise AnnotatorError(f"--model {name}: {_one_line(error)}") from error
    if not isinstance(annotator, DenseAnnotator):
        raise AnnotatorError(
            f"--model {name}: the factory returned {type(annotator).__name__}, expected a "
            "DenseAnnotator (see DenseAnnotator.from_callable)"
        )
    return annotator
