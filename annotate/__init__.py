"""Making score maps: sources of images, the dense annotator, one shard's work, the run."""

from .annotator import DenseAnnotator, Preprocessing
from .errors import AnnotatorError, InterruptedRunError, ShardsFailedError
from .run import Summary, annotate
from .sources import ImageFiles, ImageFolder, ImageSource

__all__ = [
    "AnnotatorError",
    "DenseAnnotator",
    "ImageFiles",
    "ImageFolder",
    "ImageSource",
    "InterruptedRunError",
    "Preprocessing",
    "ShardsFailedError",
    "Summary",
    "annotate",
]
