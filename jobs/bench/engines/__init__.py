"""One module an engine; each runs in a process of its own, so that none inherits another's memory or settings."""
