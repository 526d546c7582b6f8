"""The directory of a run: what it holds, and how it is written and read."""
