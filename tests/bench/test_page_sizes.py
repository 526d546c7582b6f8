"""What page sizes cost in memory."""

from __future__ import annotations

from jobs.bench.page_sizes import held


def test_pages_of_one_token_hold_what_rows_hold() -> None:
    assert held([(10, 2), (3, 1)], 1, 1) == (11 + 12) + 4


def test_samples_share_full_pages_and_have_a_partial_one_each() -> None:
    # 10 tokens are two pages of 4 and a half; tokens 11 and 12 fit into the third page, 13 needs a fourth.
    assert held([(10, 3)], 1, 4) == 12 + 12 + 16
    assert held([(10, 3)], 8, 4) == (4 + 4 + 8) + 3 * 8 / 8
