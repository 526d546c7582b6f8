"""Refuse the file of a reward function in the place of its name."""

from __future__ import annotations

import re

from rollout.errors import InputError

_FILE = re.compile(r"(?:\./)?([\w./-]+?)(?:\.py)?(?::+(\w+))?")


def refuse_file_as_target(text: str) -> None:
    """Refuse ``folder/file.py``, ``file.py:function`` and ``module:function``.

    Raises:
        InputError: so it is; the message has the name that Python imports.
    """
    match = _FILE.fullmatch(text)
    if match is None or not (text.endswith(".py") or ":" in text):
        return
    module, function = match[1].strip("/").replace("/", "."), match[2] or "FUNCTION"
    raise InputError(f"A reward is named as Python imports it: write reward._target_={module}.{function}.")
