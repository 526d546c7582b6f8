"""The version of the draws, which imports nothing, so that a fingerprint can name it without torch."""

SAMPLER_VERSION = 1
"""Raised when a seed gives other tokens than before for the same logits: by other noise, another key of it, another way
to draw, or filters and token rules that keep other tokens. Runs of another version are not resumed."""
