"""How many rows a worker runs per step, and why."""
