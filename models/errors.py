"""Errors of models/, and third-party exceptions as part of a sentence. Imports nothing heavy."""


class UnsupportedModel(ValueError):
    """A model that cannot be served; the message is one sentence with the reason."""


class UnsupportedDevice(ValueError):
    """A device that cannot run what was asked for; the message is one sentence with the reason."""


class UnsupportedAttention(UnsupportedModel):
    """An attention implementation that was requested by name, but is missing or cannot serve the model.

    The message is one sentence that begins with the argument.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"attention={name} was requested, but {reason}: choose another attention, or leave it at auto."
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without its full stop; the class name if it is empty.

    A line that ends in a colon is continued by the next one.
    """
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def clause(error: BaseException) -> str:
    """Format a third-party exception as part of a sentence: ``Class: first line``."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
