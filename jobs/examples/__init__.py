"""Examples, described in docs/examples.md; each runs in seconds on the default model."""
