"""Read a chat template's source: which variables it uses, and which dates it writes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from rollout.errors import InputError, shorten

_CLOCK = "strftime_now"
"""The function by which templates write today's date."""
_DATES = "rollout_dates"
# Shadows the template's clock. The line's end is removed by trim_blocks, so the template renders as without it.
_PINNED_CLOCK = (
    f"{{% macro {_CLOCK}(format) %}}"
    f"{{{{ {_DATES}[format] if format in {_DATES} else raise_exception('The date format is not a constant.') }}}}"
    "{% endmacro %}\n"
)


class _GenerationTag(Extension):
    """The tag ``generation`` of transformers, which marks the assistant's tokens."""

    tags = {"generation"}  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(value: str) -> str:
    """Return the template that ``value`` is, or that the file of this name holds.

    Raises:
        InputError: it is neither, or the file cannot be read.
    """
    if "{{" in value or "{%" in value:
        return value
    path = Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"chat_template is {shorten(repr(value), 80)}, which cannot be read ({reason}): give a file with a Jinja "
            "template, or the name of one of the tokenizer's templates."
        ) from error


@lru_cache(maxsize=64)
def parse(template: str) -> nodes.Template:
    """Return the syntax tree of a template.

    Raises:
        InputError: the template has a syntax error; the message names its line.
    """
    environment = jinja2.Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
    try:
        return environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"chat_template has a syntax error in line {error.lineno}: {error.message}") from error


def variables(template: str) -> frozenset[str]:
    """Return the names that a template reads."""
    return frozenset(node.name for node in parse(template).find_all(nodes.Name) if node.ctx == "load")


def dates_of(template: str, now: datetime) -> dict[str, str]:
    """Return what a template's calls of its clock give at ``now``, by their format."""
    formats = set()
    for call in parse(template).find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == _CLOCK:
            given = [*call.args, *(word.value for word in call.kwargs)][:1]
            formats |= {value.value for value in given if isinstance(value, nodes.Const)}
    return {str(form): now.strftime(str(form)) for form in sorted(formats)}


def pinned(template: str, dates: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return a template that writes ``dates`` instead of today's, and the variables that it needs."""
    return (_PINNED_CLOCK + template, {_DATES: dict(dates)}) if _CLOCK in variables(template) else (template, {})
