"""Tables of text, which become a list of cards on a narrow screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Draw a table; columns and cells are plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = (
        f"<tr>{''.join(_cell(name, cell) for name, cell in zip(columns, row, strict=True))}</tr>\n" for row in rows
    )
    return f'<table class="cards">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n</table>\n'


def _cell(name: str, text: str) -> str:
    return f'<td data-name="{escape(name)}">{escape(text)}</td>'
