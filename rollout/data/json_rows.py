"""Rows of JSON files: JSON lines, one array, or objects over several lines."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator
from typing import IO, Any

from rollout.data.data_files import BOM, DataFile, Row, not_utf8
from rollout.errors import InputError, shorten

_SPACE = " \t\r\n"
_CHUNK_BYTES = 1 << 18


def json_rows(stream: IO[bytes], file: DataFile) -> Generator[Row, None, None]:
    """Yield the objects of JSON lines, of one array, or, in a ``.json`` file, of objects over several lines.

    Raises:
        InputError: the file holds something else; the message names the line.
    """
    first = True
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.isspace() or not line:
            continue
        if first and (line.lstrip().startswith(b"[") or (file.format == "json" and not _is_json(line))):
            yield from _json_values(line, stream, file, number)
            return
        first = False
        yield Row(number, len(line), _from_line(line, number, file))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _from_line(line: bytes, number: int, file: DataFile) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
    except RecursionError as error:
        raise InputError(f"Line {number} of {file.path} is nested too deeply to be read.") from error
    except ValueError as error:
        reason = getattr(error, "msg", "it is not UTF-8")
        raise InputError(
            f"Line {number} of {file.path} is not a complete JSON object ({reason}); fix or remove it."
        ) from error
    return _as_object(value, number, file)


def _as_object(value: Any, number: int, file: DataFile) -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = shorten(json.dumps(value), longest=40)
        raise InputError(f"Line {number} of {file.path} is {shown}, but must be a JSON object.")
    return value


def _json_values(first: bytes, stream: IO[bytes], file: DataFile, number: int) -> Generator[Row, None, None]:
    """Yield the items of an array, or objects one after the other, however they are broken into lines."""
    text = _JsonText(first, stream, file, number)
    array = text.next_character() == "["
    if array:
        text.position += 1
    comma = False
    while (character := text.next_character()) and not (array and character == "]"):
        if comma:
            if character != ",":
                raise text.error("Expecting ',' delimiter")
            text.position += 1
        line, begin = text.line(), text.position
        value = text.value()
        yield Row(line, text.position - begin, _as_object(value, line, file))
        comma = array
    if array:
        if not character:
            raise text.error("it ends before its closing bracket")
        text.position += 1
        if text.next_character():
            raise text.error("Extra data")


class _JsonText:
    """The text of a stream, of which only what is not read yet is held."""

    def __init__(self, first: bytes, stream: IO[bytes], file: DataFile, number: int) -> None:
        self._stream = stream
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._counted = 0
        """Position up to which lines are counted."""
        self._line = number
        self._buffer = self._text(first)
        self.position = 0

    def next_character(self) -> str:
        """Skip white space and return the next character, which stays unread; empty at the end."""
        while True:
            while self.position < len(self._buffer):
                if (character := self._buffer[self.position]) not in _SPACE:
                    return character
                self.position += 1
            if not self._read(_CHUNK_BYTES):
                return ""

    def value(self) -> Any:
        """Read one value.

        Raises:
            InputError: it is not JSON.
        """
        self.next_character()
        size = _CHUNK_BYTES
        while True:
            try:
                value, self.position = self._decode(self._buffer, self.position)
            except RecursionError as error:
                raise self.error("it is nested too deeply") from error
            except json.JSONDecodeError as error:
                # The value may end in what is not read yet.
                if not self._read(size):
                    self.position = min(error.pos, len(self._buffer))
                    raise self.error(error.msg) from error
                size *= 2
            else:
                return value

    def line(self) -> int:
        """Return the line of the next character."""
        self._line += self._buffer.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def error(self, reason: str) -> InputError:
        """Return the error for what stands at the position."""
        return InputError(f"Line {self.line()} of {self._file.path} breaks the JSON in it ({reason}); fix it.")

    def _read(self, size: int) -> bool:
        """Drop what is read already, and read more; return False at the end."""
        self.line()
        chunk = self._stream.read(size)
        self._buffer = self._buffer[self.position :] + self._text(chunk)
        self.position = self._counted = 0
        return bool(chunk)

    def _text(self, chunk: bytes) -> str:
        try:
            return self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            lines = self._buffer.count("\n", self._counted) + chunk.count(b"\n", 0, error.start)
            raise not_utf8(self._file, self._line + lines) from error
