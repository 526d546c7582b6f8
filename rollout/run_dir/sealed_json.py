"""JSON files that carry their own checksum, so that any change to them is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "checksum"


def seal(values: Mapping[str, Any]) -> bytes:
    """Return the text of a sealed file: the values, then the SHA-256 of their text."""
    text = json.dumps(values, indent=2)
    checksum = hashlib.sha256(f"{text}\n".encode()).hexdigest()
    # As the last of the values: written into their text, because encoding it takes most of the time.
    return f'{text[:-1].rstrip()}{"," if values else ""}\n  "{_CHECKSUM}": "{checksum}"\n}}\n'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Return the values of a sealed file.

    Raises:
        ValueError: the file is not what was written.
    """
    try:
        values: Any = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict) or _CHECKSUM not in values:
        raise ValueError("it has no checksum")
    del values[_CHECKSUM]
    # The whole text is compared: a change that leaves the values as they are is one all the same.
    if seal(values) != data:
        raise ValueError("it is not as it was written: its checksum differs")
    return values
