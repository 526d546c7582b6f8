"""Attention over pages: one file per backend."""
