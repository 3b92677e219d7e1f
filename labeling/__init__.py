"""Replaying label maps while a student trains: geometry, targets, losses, data, students.

Knows the label maps of `tokenlabel.storage`, not who made them.
"""

from .loss import TokenLabelLoss
from .replay import replay
from .replay_map import ReplayMap
from .students import TokenLabelStudent
from .targets import TokenTargets

__all__ = ["ReplayMap", "TokenLabelLoss", "TokenLabelStudent", "TokenTargets", "replay"]
