"""The caller's live module: what it is, and how it is borrowed and given back."""
