"""Replaying label maps while a student trains: geometry, targets, losses, data, students."""
