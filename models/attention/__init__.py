"""Paged attention: one file per backend."""
