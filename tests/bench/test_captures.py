"""The count of captures in a batch that drains."""

from __future__ import annotations

import pytest

from jobs.bench import captures
from jobs.bench.lib.spies import watched
from tests.support.tiny_models import tiny


def test_every_call_has_a_line_and_an_engine_and_a_session_keep_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "LONGEST", 24)
    with watched() as spies:
        lines = captures.lines(tiny("llama", num_hidden_layers=1), 3, spies)
    assert [line[1] for line in lines] == [*["engine"] * 3, *["session"] * 3]
    for _, _, steps, _, replayed, eager, _ in lines:
        assert 0 < int(steps) == int(replayed) + int(eager)
    sizes = [set(line[6].split()) for line in lines]
    assert sizes[0] == sizes[3] != set()
    for first, second, third in (sizes[:3], sizes[3:]):
        assert not (first & second) | ((first | second) & third), "what the calls before have captured"
