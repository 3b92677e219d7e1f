"""Label stores: the label map, its encoding, publication, reading and verification.

Knows neither who makes the maps nor who trains on them.
"""

from .errors import TokenLabelError
from .label_map import GridView, LabelBatch, LabelMap
from .store import LabelStore, SampleInfo, open_store
from .verify import verify

__all__ = [
    "GridView",
    "LabelBatch",
    "LabelMap",
    "LabelStore",
    "SampleInfo",
    "TokenLabelError",
    "open_store",
    "verify",
]
