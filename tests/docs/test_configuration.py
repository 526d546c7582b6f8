"""docs/configuration.md is what its generator gives, and names every key."""

from __future__ import annotations

from jobs.docs.configuration import PAGE, page
from rollout.config.compose import load_config
from rollout.config.keys import dotted_keys


def test_page_is_what_the_generator_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_key_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `") and line.count(" | ") >= 3]
    assert [row[0] for row in rows if len(row[3].strip(" |")) < 3] == []


def test_page_names_every_key() -> None:
    for name in ("predictive", "memory", "sla", "paper", "static"):
        keys = [key for key in dotted_keys(load_config([f"batcher={name}", "output.dir=x"])) if key != "batcher.name"]
        text = page()
        assert [key for key in keys if f"`{key}`" not in text and key != "reward"] == []
