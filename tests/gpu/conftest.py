"""Collect the tests of this folder only if there is a GPU."""

from __future__ import annotations

from tests.support.devices import GPU

collect_ignore_glob = [] if GPU is not None else ["test_*.py"]
