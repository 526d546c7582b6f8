"""The errors of the model side."""


class UnsupportedModel(ValueError):
    """A model that cannot be served; the message is one sentence with the reason."""


class UnsupportedAttention(UnsupportedModel):
    """An attention that was asked for by name and is not there, or cannot serve the model.

    The message is one sentence that names the argument and the key.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"attention={name} was asked for (model.attention of a job), but {reason}: choose another, or leave it at "
            "auto."
        )


def clause(error: BaseException) -> str:
    """An error of others, of whatever kind, as a part of a sentence: its class and its first line."""
    first_line = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"
