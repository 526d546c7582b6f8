"""The attention that a caller may ask for by name; known without torch, so that a wrong name is refused at once."""

from __future__ import annotations

AUTO = "auto"
"""The fastest that serves."""
ATTENTION_BACKENDS = (AUTO, "triton", "compiled", "gather", "varlen", "flash_attn")
"""`rollout.models.attention.select.select_backend` says what each is."""
