"""KV and state memory: pages inside slabs."""
