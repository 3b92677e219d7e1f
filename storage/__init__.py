"""Label stores: the label map, its encoding, publication, reading and verification.

Knows neither who makes the maps nor who trains on them.
"""

from .errors import TokenLabelError
from .label_map import GridView, LabelBatch, LabelMap

__all__ = ["GridView", "LabelBatch", "LabelMap", "TokenLabelError"]
