"""How many rows may live now, and why."""
