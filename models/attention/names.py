"""Names of the attention backends that a caller may select; importable without torch, so a typo fails at once."""

from __future__ import annotations

AUTO = "auto"
"""The fastest backend that serves the model on its device."""
ATTENTION_BACKENDS = (AUTO, "triton", "compiled", "gather", "varlen", "flash_attn")
"""`rollout.models.attention.select.select_backend` maps each name to an `AttentionBackend`."""
