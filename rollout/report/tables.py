"""Tables of text, which become a list of cards on a narrow screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_LONG = 40
"""Characters from which a cell does not stand beside its name on a narrow screen."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Draw a table; columns and cells are plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = (
        f"<tr>{''.join(_cell(name, cell) for name, cell in zip(columns, row, strict=True))}</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table class="cards">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _cell(name: str, text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f'<td data-name="{escape(name)}"{kind}>{escape(text)}</td>'
