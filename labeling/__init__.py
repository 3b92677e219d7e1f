"""Replaying label maps while a student trains: geometry, targets, losses, data, students.

Knows the label maps of `tokenlabel.storage`, not who made them.
"""

from .dataset import TokenLabelBatch, TokenLabelCollate, TokenLabelDataset
from .loss import TokenLabelLoss
from .replay import replay
from .replay_map import ReplayMap, targets_from
from .students import TokenLabelStudent
from .targets import TokenTargets

__all__ = [
    "ReplayMap",
    "TokenLabelBatch",
    "TokenLabelCollate",
    "TokenLabelDataset",
    "TokenLabelLoss",
    "TokenLabelStudent",
    "TokenTargets",
    "replay",
    "targets_from",
]
