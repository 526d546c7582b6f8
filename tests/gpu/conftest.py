"""What only a GPU has; without one there is nothing to collect here."""

from __future__ import annotations

from tests.support.devices import GPU

collect_ignore_glob = [] if GPU is not None else ["test_*.py"]
