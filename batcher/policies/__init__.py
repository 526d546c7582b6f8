"""Batching policies, one file per ``batcher=`` option."""
