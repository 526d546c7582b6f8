"""Datasets as prompts."""
