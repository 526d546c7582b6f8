"""Hydra configuration: one folder a group, ``experiment/`` on top."""
