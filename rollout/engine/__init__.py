"""The engine: continuous batching on a live module."""
