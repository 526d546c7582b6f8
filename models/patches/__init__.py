"""Faster replacements for parts of the caller's module."""
